"""Every command and example of the README, CONTRIBUTING and the site, run in the order of its page.

A page is written for its reader, with real arguments:

- ``sh`` blocks hold commands, ``console`` blocks commands after ``$`` and what they print, ``python`` blocks code; all
  others say ``text``, ``diff`` or ``json``. Shown output is compared with numbers masked; ``...`` stands for any lines.
- ``<!-- not run in tests: REASON -->`` before a block: its commands are only parsed, its code only compiled.
- ``<!-- run in tests where PACKAGE is installed -->``: so.
- ``<!-- from PATH -->``: the block is part of that file, word for word.

Tests run at ``--effort smoke`` what a page runs at another effort, in one process, and change nothing else. ``desk``
has the files that a reader has. Commands in the text are parsed too, with ``PLACEHOLDERS`` for words in capitals.
"""

import argparse
import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import typer
from markdown_it import MarkdownIt
from PIL import Image

from zsq.api import resolve
from zsq.cli import app, main
from zsq.cli.options import read_overrides
from zsq.core import Bits, Method, ZsqError, show
from zsq.methods import BASELINES, METHODS

ROOT = Path(__file__).parents[1]
LANGUAGES = {"sh", "console", "python", "text", "diff", "json"}
PLACEHOLDERS = {
    "MODEL": "zoo:digits-resnet",
    "METHOD": "genie",
    "BITS": "w4a4",
    "SEED": "0",
    "DATA": "digits",
    "RUN": "runs/run",
    "FILE": "runs/run/ort-x86.onnx",
    "FOLDER": "folder",
    "DIR": "folder",
    "CARD": "intraq",
    "NAME": "digits-resnet",
    "A": "zeroq",
    "B": "genie",
}
LEFT = {"docs/adapters.md": ["float.onnx", "ort-int8.onnx"], "docs/deployment.md": ["runs/deploy/ort-x86.onnx"]}
"""Files of more than 10,000 bytes that a page leaves behind."""

MY_NET = """
from torch import nn

def build():
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), *pool, nn.Linear(8, 10))
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it stands in, and the comment before it."""

    language: str
    text: str
    line: int
    note: str


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generated() -> dict[str, str]:
    made: dict[str, str] = hook("pages").pages()
    return {f"site/{place}": text for place, text in made.items() if place not in ("contributing.md", "changelog.md")}


FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
PAGES = WRITTEN | generated()


def blocks(text: str) -> list[Block]:
    found, note = [], ""
    for token in MarkdownIt().enable("table").parse(text):
        if token.type == "html_block":
            note = token.content.strip().removeprefix("<!--").removesuffix("-->").strip()
        elif token.type == "fence":
            assert token.map is not None
            found.append(Block(token.info.split(" ")[0], token.content, token.map[0] + 1, note))
            note = ""
        else:
            note = ""
    return found


def spans(text: str) -> list[str]:
    """The code in running text and tables."""
    inline = [token.children or [] for token in MarkdownIt().enable("table").parse(text) if token.type == "inline"]
    return [child.content for children in inline for child in children if child.type == "code_inline"]


def commands(block: Block) -> list[tuple[list[str], list[str]]]:
    """The words of each command, and the lines that it is said to print."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "sh":
        return [(words, []) for line in lines if (words := shlex.split(line, comments=True))]
    found: list[tuple[list[str], list[str]]] = []
    for line in lines:
        if line.startswith("$ "):
            found.append((shlex.split(line[2:], comments=True), []))
        else:
            found[-1][1].append(line)
    return found


# --- parsed -------------------------------------------------------------------------------------------------------


def check(words: list[str], whole: bool = True) -> None:
    """Fail unless everything in a command exists: options, values, files, targets. ``whole`` is False for mentions."""
    match words:
        case ["zsq", *rest]:
            check_zsq(rest, whole)
        case ["python", *rest]:
            check_python(rest, whole)
        case ["torchrun", *rest]:
            check_zsq(rest[rest.index("zsq") + 1 :] or ["--help"], whole)
        case ["make", *targets]:
            known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(targets) <= set(known), words
        case ["pip", "install", what]:
            extras = re.search(r"\[(.*)\]", what)
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert set(extras[1].split(",") if extras else ()) <= set(project["optional-dependencies"]), words
        case _:
            pytest.fail(f"nothing here knows what {words} is")


def check_zsq(words: list[str], whole: bool) -> None:
    command = typer.main.get_command(app)
    if not whole and words[0] not in command.commands:
        assert words[0].isupper() or words[0].startswith("--"), words
        return
    named = command.commands[words[0]]
    options = [spelled for each in named.params for spelled in (*each.opts, *each.secondary_opts)]
    known = {*options, "--help"}
    assert {word for word in words[1:] if word.startswith("--")} <= known, words
    try:
        given = named.make_context(words[0], words[1:]).params
    except typer.TyperException as error:
        said = error.format_message()
        assert not whole, said
        assert "Missing" in said or "requires an argument" in said, said
        return
    names = given.get("method") or given.get("methods") or ""
    overrides = read_overrides(given.get("settings"))
    for name, protocol in product(names.split(","), (given.get("protocol") or "").split(",")):
        if name:
            name, _, preset = name.partition(":")
            preset = preset or given.get("preset", "paper")
            resolve(name, preset=preset, effort=given["effort"], protocol=protocol or None, overrides=overrides)
    for bits in given.get("bits", "w4a4").split(","):
        Bits.parse(bits)


class Parsed(Exception):
    """A script has parsed its arguments and would now begin."""


def check_python(words: list[str], whole: bool) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *arguments: object) -> None:
        parse(parser)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        if importlib.util.find_spec("nncf") is None:
            patch.setitem(sys.modules, "nncf", ModuleType("nncf"))  # a script that needs it is only asked for options
        try:
            run_python(words, patch)
        except Parsed:
            return
        except SystemExit:
            if not whole and "arguments are required" in said.getvalue():
                return
            pytest.fail(f"{words}: {said.getvalue()}")
    pytest.fail(f"{words} parses no arguments")


# --- run ----------------------------------------------------------------------------------------------------------


def run_python(words: list[str], patch: pytest.MonkeyPatch) -> None:
    if words[0] == "-m":
        patch.setattr(sys, "argv", words[1:])
        patch.delitem(sys.modules, words[1], raising=False)  # another test may have imported it
        runpy.run_module(words[1], run_name="__main__")
        return
    script = ROOT / words[0]
    patch.setattr(sys, "argv", [str(script), *words[1:]])
    patch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def quick(words: list[str]) -> list[str]:
    """A command of zsq at the least effort, where it has one, and in this process."""
    if words[0] not in ("quantize", "synthesize", "compare"):
        return words
    if words[0] == "compare":
        words = [*words, "--engine", "local"]
    if "--effort" in words:
        at = words.index("--effort") + 1
        return [*words[:at], "smoke", *words[at + 1 :]]
    return [*words, "--effort", "smoke"]


def masked(line: str) -> str:
    """A line without numbers and effort."""
    line = re.sub(r"\| - \|$", "| 0 |", line)  # the memory of a cell, which this process cannot know
    return re.sub(r"(?<![\w-])-?\d[\d,.]*", "#", re.sub(r"\beffort \w+", "effort", " ".join(line.split())))


def compare(shown: list[str], said: str) -> None:
    """Fail unless ``said`` is what is shown, but for numbers and the effort."""
    pattern = "".join(".*?" if line == "..." else re.escape(masked(line)) + "\n" for line in shown)
    text = "".join(f"{masked(line)}\n" for line in said.splitlines())
    assert re.fullmatch(pattern, text, re.DOTALL), f"shown:\n{chr(10).join(shown)}\n\nprinted:\n{said}"


def run(words: list[str], shown: list[str], patch: pytest.MonkeyPatch) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        match words:
            case ["zsq", *rest]:
                check(words)  # of which running it at the least effort would hide the effort
                assert main(quick(rest)) == 0, words
            case ["python", *rest]:
                run_python(rest, patch)
            case _:
                pytest.fail(f"tests cannot run {words}: write <!-- not run in tests: REASON --> before its block")
    if shown:
        compare(shown, said.getvalue())


def run_block(block: Block, page: str, names: dict[str, object], patch: pytest.MonkeyPatch) -> None:
    skipped = block.note.startswith("not run in tests: ")
    if where := re.fullmatch(r"run in tests where (\w+) is installed", block.note):
        skipped = importlib.util.find_spec(where[1]) is None
    if block.language in ("sh", "console"):
        for words, shown in commands(block):
            if skipped:
                check(words)
            else:
                run(words, shown, patch)
    elif block.language == "python":
        if source := re.fullmatch(r"from (\S+)", block.note):
            assert block.text in (ROOT / source[1]).read_text(), f"{page} shows what {source[1]} is not"
            return
        code = "\n" * block.line + re.sub(r'effort="\w+"', 'effort="smoke"', block.text)
        compiled = compile(code, page, "exec")
        if not skipped:
            exec(compiled, names)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the files that pages speak of."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "cifar10-test.zip", "w") as file:
        for label in range(10):
            png = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(png, "PNG")
            file.writestr(f"test/{label}/0.png", png.getvalue())
    Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / "digit.png")
    (tmp_path / "my_net.py").write_text(MY_NET)
    names: dict[str, object] = {}
    exec(MY_NET, names)
    torch.save(names["build"]().state_dict(), tmp_path / "weights.pt")  # type: ignore[operator]
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:torchvision .* was built for another torch")
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text)])
def test_what_a_page_shows_runs(page: str, desk: Path, monkeypatch: pytest.MonkeyPatch):
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(PAGES[page]):
        run_block(block, page, names, monkeypatch)
    assert all((desk / name).stat().st_size > 10_000 for name in LEFT.get(page, []))


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_their_language(page: str):
    assert {block.language for block in blocks(PAGES[page])} <= LANGUAGES


@pytest.mark.filterwarnings("ignore:torchvision .* was built for another torch")
@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist(page: str):
    for span in spans(PAGES[page]):
        words = [PLACEHOLDERS.get(word, word) for word in re.sub(r"[\[\]]|\.\.\.", " ", span).split()]
        if re.match(r"(zsq|torchrun|make|python) ", span):
            check(words, whole=False)
        elif re.fullmatch(r"(src|docs|examples|experiments|benchmarks|tests)/[\w./-]*", span):
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str):
    """Those of the site are followed where it is built."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", WRITTEN[page]):
        path = ROOT / page if target == "" else ROOT / target
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, anchor


# --- what is generated ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS.values(), *BASELINES.values()], ids=lambda method: method.name)
def test_a_method_has_a_page(method: Method):
    page = PAGES[f"site/methods/{method.name}.md"]
    assert method.paper.title in page
    assert show(method) in page
    assert all(show(method.preset(name)) == show(method) or f"\n`{name}`\n" in page for name in method.presets)
    path, _, value = re.findall(r"`--set ([^`]*)`", page)[-1].partition("=")
    assert dict(method.leaves())[path] == float(value)


def test_every_option_is_listed():
    for name, command in typer.main.get_command(app).commands.items():
        section = PAGES["site/cli.md"].partition(f"\n## zsq {name}\n")[2].partition("\n## ")[0]
        options = {spelled for each in command.params for spelled in each.opts if spelled.startswith("--")}
        assert {option for option in options if f"`{option}" not in section} <= {"--help"}


def test_doctests_become_blocks():
    text = "Twice.\n\n>>> 1 + 1\n2\n\nAnd ``>>>`` stays."
    assert hook("doctests").fenced(text) == "Twice.\n\n```pycon\n>>> 1 + 1\n2\n```\nAnd ``>>>`` stays."


# --- these tests themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "zsq quantize zoo:digits-resnet --method zeroq --bits w4a4 --folder run",
        "zsq quantize zoo:digits-resnet --method geni --bits w4a4 --out run",
        "zsq quantize zoo:digits-resnet --method zeroq --bits w4a4 --set synthesizer.step=3 --out run",
        "zsq quantize zoo:digits-resnet --method zeroq --bits w1a4 --out run",
        "zsq quantise zoo:digits-resnet --method zeroq --bits w4a4 --out run",
        "zsq verify file.onnx",
        "python experiments/collect.py",
        "python experiments/curve.py hast w4a4 --stop 3 --data digits --out run",
        "make tests",
        "pip install '.[digit]'",
        "ls",
    ],
)
def test_a_stale_command_is_found(line: str):
    with pytest.raises((AssertionError, ZsqError, KeyError, pytest.fail.Exception)):
        check(shlex.split(line))


def test_shown_output_is_compared():
    compare(["top-1  98.5 %", "...", "effort fast"], "top-1   97.25 %\nany\nmore\neffort smoke\n")
    with pytest.raises(AssertionError):
        compare(["top-1  98.5 %"], "top-5  98.5 %\n")
