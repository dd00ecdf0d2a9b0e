"""The pages of the site that are made from the code, each time it is built, so that they cannot be stale.

``pages()`` is all of them as Markdown; the functions below it are mkdocs hooks.
"""

import ast
import contextlib
import importlib
import inspect
import io
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import zsq
from zsq.api import protocol_of
from zsq.cli import app, main
from zsq.core import FLOAT, Method, Recipe, walk
from zsq.export import TARGETS
from zsq.methods import BASELINES, METHODS
from zsq.quant import PROTOCOLS
from zsq.zoo import MODELS

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "zsq.core": "Words",
    "zsq.losses": "Losses",
    "zsq.synthesis": "Making images",
    "zsq.quant": "Making networks low-bit",
}
"""Those whose public names are ingredients of a method, with the titles of their pages."""
AROUND = {
    "Accuracy": ("zsq.evaluate.evaluate", "zsq.evaluate.check_images"),
    "Comparisons": (
        "zsq.compare.Grid",
        "zsq.compare.plan",
        "zsq.compare.compare",
        "zsq.compare.Comparison",
        "zsq.engines.Processes",
        "zsq.engines.InProcess",
        "zsq.rows.read_rows",
        "zsq.table.tables",
        "zsq.table.markdown",
    ),
    "The loss without data": ("zsq.estimate.estimate_drop", "zsq.estimate.Estimate", "zsq.estimate.Agreement"),
    "Errors": (
        "zsq.core.errors.RecipeError",
        "zsq.core.errors.UnsupportedModel",
        "zsq.core.errors.CheckpointError",
        "zsq.core.errors.DataError",
        "zsq.core.errors.RunError",
        "zsq.core.errors.MissingExtra",
        "zsq.core.errors.MissingView",
    ),
    "Export": ("zsq.api.plan_export", "zsq.export.Plan", "zsq.export.Target"),
    "Exported files": (
        "zsq.runtime.verify.verify",
        "zsq.runtime.benchmark.benchmark",
        "zsq.runtime.floats.export_float",
    ),
    "Images in other quantizers": (
        "zsq.runtime.adapters.CalibrationReader",
        "zsq.runtime.adapters.nncf_dataset",
        "zsq.runtime.adapters.batches",
    ),
    "Layers and reports": (
        "zsq.layers.layers_of",
        "zsq.layers.Layers",
        "zsq.layers.Layer",
        "zsq.layers.Histogram",
        "zsq.report.write_report",
    ),
    "Memory": ("zsq.allocator.keep_freed_memory",),
}
"""What stands beside ``import zsq``, by heading."""


def pages() -> dict[str, str]:
    """Every generated page: where it lies in the site, and its Markdown."""
    systems = {**METHODS, **BASELINES}
    return {
        "methods/index.md": methods_page(),
        **{f"methods/{name}.md": method_page(method) for name, method in systems.items()},
        "protocols.md": protocols_page(),
        "targets.md": targets_page(),
        "zoo.md": zoo_page(),
        "cli.md": cli_page(),
        "api/index.md": library_page(),
        **{f"api/{name.removeprefix('zsq.')}.md": package_page(name) for name in PACKAGES},
        "api/around.md": around_page(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "]("),
    }


def on_config(config: "MkDocsConfig") -> None:
    """Put the generated pages where ``nav`` asks for those of a folder."""
    made = pages()

    def filled(items: list[Any]) -> list[Any]:
        entries: list[Any] = []
        for item in items:
            match item:
                case {"generated": str(folder)}:
                    entries += [place for place in made if place.startswith(f"{folder}/")]
                case dict():
                    entries.append({k: filled(v) if isinstance(v, list) else v for k, v in item.items()})
                case _:
                    entries.append(item)
        return entries

    config.nav = filled(config.nav or [])


def on_files(files: "Files", config: "MkDocsConfig") -> None:
    """Add the generated pages to those that lie in ``docs``."""
    from mkdocs.structure.files import File

    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))


def on_post_page(output: str, page: "Page", config: "MkDocsConfig") -> str:
    """Fail if the page would fetch anything from elsewhere when it is opened."""
    from mkdocs.exceptions import PluginError

    if fetched := re.search(r"""(?:src=|<link[^>]*href=|url\()["']?(?:https?:)?//[^"'>)]+""", output):
        raise PluginError(f"{page.file.src_uri} fetches {fetched[0]}")
    return output


# --- methods ------------------------------------------------------------------------------------------------------


def methods_page() -> str:
    """The list of systems, and what its columns mean."""
    facts = json.loads(said("methods", "--json"))
    rows = [["method", "paper", "needs", "makes images", "trains", "protocol"]]
    for each in (*facts["methods"], *facts["controls"]):
        rows.append(
            [
                f"[`{each['method']}`]({each['method']}.md)",
                f"{each['title']}, {each['venue']}",
                ", ".join(each["needs"]) or "-",
                f"`{each['images']}`" if each["images"] else "no",
                "yes" if each["trains"] else "no",
                f"[`{each['protocol']}`](../protocols.md#{each['protocol']})",
            ]
        )
    plugins = [
        f"- [`{each['plugin']}`]({each['plugin']}.md) on {', '.join(each['hosts'])}" for each in facts["plugins"]
    ]
    return f"""# Methods

{table(rows)}

Each is the corrected method with the numbers of its paper. Where a released code differs, its page says so, and the
variant is a preset. `nearest` is no paper but the control that each must beat.

What a method *needs* of a network: `bn` BatchNorm layers with running statistics, `features` what a last layer reads,
`branches` and `maps` outputs of convolutions, `attention` attention maps, `class_token` and `tokens` a class token
and patches that can be left out. A method refuses a network without, before any work, and names those that fit.

## Plug-ins

A plug-in improves a host. It is written before it:

```sh
zsq show ait+qimera
```

{chr(10).join(plugins)}
"""


def method_page(method: Method) -> str:
    """One system: what it does, what it needs, how it is called, and its whole recipe."""
    name = method.name
    module = importlib.import_module(f"zsq.methods.{name.replace('-', '_')}")
    listed = json.loads(said("methods", "--json"))
    about = next(each for each in (*listed["methods"], *listed["controls"]) if each["method"] == name)
    paper = method.paper
    link = f", [arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""
    model = "zoo:vit-cifar10" if "attention" in about["needs"] else "zoo:digits-resnet"
    nearest = relative(method)
    facts = [
        ["", ""],
        ["needs", ", ".join(f"`{each}`" for each in about["needs"]) or "nothing but layers with weights"],
        ["makes images", f"`{about['images']}`" if about["images"] else "no"],
        ["trains", "yes" if about["trains"] else "no"],
        ["protocol", f"[`{about['protocol']}`](../protocols.md#{about['protocol']})"],
        ["presets", ", ".join(f"`{each}`" for each in about["presets"])],
        ["source", f"`src/{module.__name__.replace('.', '/')}.py`"],
    ]
    for each in listed["plugins"]:
        if each["plugin"] == name:
            facts.append(["on a host", ", ".join(f"`{name}+{host}`" for host in each["hosts"])])
    return f"""# {name}

**{paper.title}**, {paper.venue}{link}

{inspect.getdoc(module)}

{table(facts)}

```sh
zsq quantize {model} --method {name} --bits w4a4 --effort fast --out runs/{name}
```

{_ingredients(method, module.__name__)}
{_presets(method)}
## Beside `{nearest}`

The nearest of the other systems, and what distinguishes the two:

```console
$ zsq diff {nearest} {name}
{said("diff", nearest, name)}```

## The recipe

The names on the left are the paths that `--set` takes: `--set {_example(method)}`.

```console
$ zsq show {name}
{said("show", name)}```

## The code {{ data-search-exclude }}

??? example "`src/{module.__name__.replace(".", "/")}.py`"

{indented(fence("python", inspect.getsource(module)))}
"""


def relative(method: Method) -> str:
    """The other system or control whose recipe differs in the fewest lines."""
    others = [other for other in {**METHODS, **BASELINES}.values() if other.name != method.name]
    return min(others, key=lambda other: len(zsq.diff(other, method).splitlines())).name


def _ingredients(method: Method, module: str) -> str:
    """What the recipe is made of, each class with its first line, and in full where it is this paper's own."""
    public = {
        id(getattr(importlib.import_module(package), name)): f"{package}.{name}"
        for package in PACKAGES
        for name in importlib.import_module(package).__all__
    }
    rows, own = [["", ""]], []
    for kind in dict.fromkeys(type(each) for each in walk(method)):
        if kind is Method:
            continue
        label = f"`{kind.__name__}`"
        if kind.__module__ == module:
            own.append(_reference(f"{module}.{kind.__name__}"))
            label = f"[{label}][{module}.{kind.__name__}]"
        elif id(kind) in public:
            label = f"[{label}][{public[id(kind)]}]"
        rows.append([label, first_line(kind)])
    new = "\n".join(["### New in this paper", "", *own]) if own else ""
    return f"## Ingredients\n\n{table(rows)}\n\n{new}"


def _presets(method: Method) -> str:
    """What each preset changes."""
    changed = [
        f"`{name}`\n\n{fence('diff', zsq.diff(method, method.preset(name)))}"
        for name in method.presets
        if zsq.diff(method, method.preset(name))
    ]
    if not changed:
        return ""
    said = "`--effort fast` takes the preset `fast`; the others are given with `--preset`. What each changes:"
    return "\n\n".join(["## Presets", said, *changed, ""])


def _example(method: Method) -> str:
    """A number that a reader may want to change, as it stands."""
    numbers = [(path, value) for path, value in method.leaves() if type(value) in (int, float)]
    counts = [(path, value) for path, value in numbers if path.endswith((".steps", ".samples"))]
    path, value = (counts or numbers)[0]
    return f"{path}={value}"


# --- the other tables ---------------------------------------------------------------------------------------------


def protocols_page() -> str:
    """Each protocol with its values, and who has it as its own."""
    known = {protocol.name: protocol for protocol in PROTOCOLS.values()}
    own, aliases = defaultdict(list), defaultdict(list)
    for name, protocol in PROTOCOLS.items():
        if name != protocol.name:
            aliases[protocol.name].append(f"`{name}`")
    for method in {**METHODS, **BASELINES}.values():
        protocol = protocol_of(method)
        known.setdefault(protocol.name, protocol)
        own[protocol.name].append(f"[`{method.name}`](methods/{method.name}.md)")
    parts, rows = [], [["protocol", "placement", "at the ends", "folds BatchNorm", "default of"]]
    for name, protocol in known.items():
        says = [f"Also called {', '.join(aliases[name])}."] if aliases[name] else []
        says += [f"That of {', '.join(own[name])} by default."] if own[name] else []
        if name not in PROTOCOLS:
            says.append("`--protocol` does not take it.")
        if name in TARGETS:
            says.append(f"For the target [`{name}`](targets.md#{name}).")
        parts.append("\n\n".join([f"## {name}", " ".join(says), fence("text", zsq.show(protocol))]))
        ends = {bits for bits in protocol.ends.parts().values() if bits is not None}
        rows.append(
            [
                f"[`{name}`](#{name})",
                f"`{type(protocol.placement).__name__}`",
                " and ".join("float" if bits == FLOAT else f"{bits} bits" for bits in sorted(ends)) or "as all",
                "yes" if protocol.fold else "no",
                ", ".join(own[name]) or "-",
            ]
        )
    return f"""# Protocols

A protocol says where quantizers sit, which ends keep 8 bits, and on which grids values lie. Accuracies compare only
under one: `--protocol` puts any method under any of these, and every run records which it was.
`placement` is one of [`AfterActivations`][zsq.quant.AfterActivations], [`LayerInputs`][zsq.quant.LayerInputs],
[`EveryEdge`][zsq.quant.EveryEdge], `IntegerKernels`; `ends` are [`Ends`][zsq.quant.Ends], in bits, 32 for float.

{table(rows)}

{chr(10).join(parts)}
"""


def targets_page() -> str:
    """What `zsq export` can write for."""
    parts = []
    for name, target in TARGETS.items():
        facts = [
            ["", ""],
            ["file", f"`{target.suffix}`"],
            ["protocol", f"[`{target.protocol.name}`](protocols.md#{target.protocol.name})"],
            ["activations", f"`{target.activations}`"],
            [
                "weights of at most 4 bits",
                "stored in 4 bits" if target.int4 else "stored in 8 bits, with the same values",
            ],
            ["cannot hold", target.cannot],
            ["speed of integers", target.integer],
            ["of what stays float", target.floating],
        ]
        parts.append(f"## {name}\n\n{table(facts)}\n")
    return f"""# Targets

What `zsq export --target` writes for. [Deployment](deployment.md) says how.

{chr(10).join(parts)}
"""


def zoo_page() -> str:
    """The shipped networks, and the card of each."""
    cards = []
    for name in MODELS:
        card = (ROOT / "src" / "zsq" / "zoo" / "cards" / f"{name}.md").read_text()
        cards.append(re.sub(r"^#", "##", card, flags=re.MULTILINE))
    return f"""# Zoo

Small networks that ship with the package, trained by `zsq.zoo.train`. [Networks and data](networks.md) says how to
name others.

```console
$ zsq models
{said("models")}```

{chr(10).join(cards)}
"""


def cli_page() -> str:
    """Every command with its arguments and options, read from the program itself."""
    command = typer.main.get_command(app)
    parts = []
    for name, each in command.commands.items():
        with typer.Context(each, info_name=f"zsq {name}") as context:
            usage = each.get_usage(context)
            records = [record for part in each.params if (record := part.get_help_record(context))]
        rows = [["", ""], *([f"`{spelled}`", cell(text)] for spelled, text in records)]
        parts.append(f"## zsq {name}\n\n{inspect.cleandoc(each.help)}\n\n{fence('text', usage)}\n\n{table(rows)}\n")
    return f"""# Command line

{command.help}

Every mistake of the caller is one line on standard error and exit code 2; `verify` ends with 1 if it found a fault,
and an interruption with 130. `--json` prints the same facts for programs. `zsq COMMAND --help` says what stands here.

{chr(10).join(parts)}
"""


# --- Python -------------------------------------------------------------------------------------------------------


def library_page() -> str:
    """What ``import zsq`` gives."""
    return f"""# zsq

{inspect.getdoc(zsq)}

`zsq.METHODS` holds the [systems](../methods/index.md) by name, `zsq.BASELINES` the controls. All that is documented on
these pages is public, and nothing else is.

{references("zsq", {"METHODS", "BASELINES", "__version__"})}
"""


def package_page(package: str) -> str:
    """The public names of one package of ingredients."""
    module = importlib.import_module(package)
    elsewhere = {name for name in module.__all__ if name in zsq.__all__ or _is_error(getattr(module, name))}
    about = f"{inspect.getdoc(module)} `from {package} import ...`"
    return f"# {PACKAGES[package]}\n\n{about}\n\n{references(package, elsewhere)}"


def _is_error(value: Any) -> bool:
    """Whether a public name is an exception; those have a place together."""
    return isinstance(value, type) and issubclass(value, zsq.ZsqError)


def around_page() -> str:
    """What lies in modules of its own."""
    parts = [f"## {title}\n\n{''.join(map(_reference, names))}" for title, names in AROUND.items()]
    return "\n".join(["# Around the library", "", *parts])


def references(package: str, elsewhere: set[str]) -> str:
    """Places for the documentation of the package's names but those, under the modules that they are from."""
    module = importlib.import_module(package)
    parts = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zsq."):
            names = [each.name for each in node.names if each.name in module.__all__ and each.name not in elsewhere]
            if names:
                about = (inspect.getdoc(importlib.import_module(node.module)) or "").split("\n\n")[0]
                parts.append(f"## {node.module}\n\n{about}\n")
                parts += [_reference(f"{package}.{name}") for name in names]
    return "\n".join(parts)


def _reference(name: str) -> str:
    return f"::: {name}\n    options:\n      heading_level: 3\n\n"


# --- text ---------------------------------------------------------------------------------------------------------


def said(*words: str) -> str:
    """What a command of zsq prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(words)
    assert code == 0, words
    return out.getvalue()


def first_line(kind: type[Recipe]) -> str:
    """The first line of a docstring, as a cell."""
    return cell((inspect.getdoc(kind) or "").split("\n\n")[0])


def cell(text: str) -> str:
    """``text`` as a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(rows: list[list[str]]) -> str:
    """Rows as a Markdown table; the first is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


def fence(language: str, text: str) -> str:
    """``text`` as a code block."""
    return f"```{language}\n{text.rstrip()}\n```"


def indented(text: str) -> str:
    """``text`` as the body of what stands above it."""
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())
