"""The command line: what it prints, and one line with exit code 2 for every mistake."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from zsq import __version__
from zsq.cli import main
from zsq.core import UnsupportedModel

TINY = """
from torch import nn

def build(bn=True):
    norm = nn.BatchNorm2d(4) if bn else nn.Identity()
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 10))

def plain():
    return build(bn=False)

def noisy():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Noise())

class Noise(nn.Module):
    def forward(self, x):
        return x + x.new_empty(x.shape).normal_()
"""
SMOKE = ("--effort", "smoke", "--device", "cpu")


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "tiny.py").write_text(TINY)
    return f"{tmp_path / 'tiny.py'}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "nearest"
    words = ["quantize", "zoo:digits-resnet", "--method", "nearest", "--bits", "w4a4", "--data", "digits", *SMOKE]
    assert main([*words, "--out", str(folder)]) == 0
    return folder


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from zsq.cli import main; assert main(['--help']) == 0; "
        "assert not {'torch', 'numpy', 'rich', 'pydantic'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in (
        "methods",
        "show",
        "diff",
        "models",
        "quantize",
        "synthesize",
        "evaluate",
        "export",
        "compare",
        "table",
    ):
        assert f"\n  {command} " in shown


def test_the_library_imports_no_extra():
    code = (
        "import sys, zsq; zsq.quantize; zsq.load_network; "
        "assert not {'torchvision', 'timm', 'onnx', 'sklearn', 'typer', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_python_m_zsq():
    asked = subprocess.run([sys.executable, "-m", "zsq", "--version"], capture_output=True, text=True, check=True)
    assert asked.stdout == f"zsq {__version__}\n"
    wrong = subprocess.run([sys.executable, "-m", "zsq", "show"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", "zsq: error: Missing argument 'METHOD'.\n")


def read_nothing(words: list[str]) -> None:
    """The command succeeds without a word of complaint for a reader that has left."""
    with subprocess.Popen(
        [sys.executable, "-m", "zsq", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_reader_that_leaves_is_no_error():
    read_nothing(["show", "genie"])


def test_no_command_is_help(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("Usage: zsq ")


def test_methods(capsys: pytest.CaptureFixture[str]):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["method", "needs", "trains", "images", "venue", "confidence", "protocol"]
    genie = next(line for line in lines if line.startswith("genie"))
    assert genie.split() == ["genie", "bn", "yes", "OptimizeLatents", "CVPR", "2023", "high", "ptq-8bit-ends"]
    controls, plugins = lines.index("controls"), lines.index("plug-ins, written NAME+HOST")
    assert [line.split()[0] for line in lines[controls + 1 : plugins - 1]] == ["nearest"]
    assert lines[plugins + 1 :] == [
        "synq  on zeroq, intraq, genie, hast, psaq-vit, smi, gdfq, qimera, ait",
        "ait   on intraq, hast, synq, gdfq, qimera",
    ]


def test_methods_as_json(capsys: pytest.CaptureFixture[str]):
    assert main(["methods", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    zeroq = next(each for each in facts["methods"] if each["method"] == "zeroq")
    assert zeroq["needs"] == ["bn"]
    assert zeroq["trains"] is False
    assert zeroq["arxiv"] == "2001.00281"
    assert [each["method"] for each in facts["controls"]] == ["nearest"]
    assert [each["plugin"] for each in facts["plugins"]] == ["synq", "ait"]
    assert facts["plugins"][1]["hosts"] == ["intraq", "hast", "synq", "gdfq", "qimera"]


def test_show(capsys: pytest.CaptureFixture[str]):
    assert main(["show", "nearest"]) == 0
    assert capsys.readouterr().out.startswith(
        "nearest: Round to nearest, ranges from Gaussian noise (baseline)\n"
        "presets: paper, fast\n"
        "\n"
        "synthesizer = Noise\n"
        "synthesizer.pixels = GaussianPixels\n"
    )


def test_show_applies_preset_and_effort(capsys: pytest.CaptureFixture[str]):
    assert main(["show", "genie", "--preset", "qdrop-ends", "--effort", "fast"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "genie: Genie: Show Me the Data for Quantization (CVPR 2023, arXiv 2212.04780)"
    assert "quantizer.insert_fake_quant.protocol.ends.second_input = None" in lines
    assert "quantizer.reconstruct_blocks.steps = 500" in lines


def test_diff(capsys: pytest.CaptureFixture[str]):
    assert main(["diff", "zeroq", "genie"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["- synthesizer = OptimizeImages", "+ synthesizer = OptimizeLatents"]
    assert {line[:2] for line in lines} == {"- ", "+ "}
    assert main(["diff", "zeroq", "zeroq"]) == 0
    assert capsys.readouterr().out == ""


def test_what_distinguishes_qimera_from_gdfq_is_where_its_images_start(capsys: pytest.CaptureFixture[str]):
    assert main(["diff", "gdfq", "qimera"]) == 0
    assert capsys.readouterr().out == (
        "- synthesizer.latents = PlainNoise\n"
        "+ synthesizer.latents = SuperposedClasses\n"
        "+ synthesizer.latents.superposed = 500\n"
        "+ synthesizer.latents.share = 0.4\n"
        "+ synthesizer.latents.mapping = True\n"
        "+ synthesizer.latents.from_classifier = True\n"
    )


def test_what_distinguishes_hast_from_intraq_are_hard_images_and_aligned_energies(capsys: pytest.CaptureFixture[str]):
    assert main(["diff", "intraq", "hast"]) == 0
    assert capsys.readouterr().out == (
        "- synthesizer.loss.soft_inception = SoftInception\n"
        "- synthesizer.loss.soft_inception.weight = 1.0\n"
        "- synthesizer.loss.soft_inception.least = 0.9\n"
        "- synthesizer.loss.centre_distance = CentreDistance\n"
        "- synthesizer.loss.centre_distance.weight = 1.0\n"
        "- synthesizer.loss.centre_distance.lower = 0.3\n"
        "- synthesizer.loss.centre_distance.upper = 0.8\n"
        "+ synthesizer.loss.hard_cross_entropy = HardCrossEntropy\n"
        "+ synthesizer.loss.hard_cross_entropy.weight = 0.1\n"
        "+ synthesizer.loss.hard_cross_entropy.focus = 0.5\n"
        "- synthesizer.jitter.scale = 0.5\n"
        "+ synthesizer.jitter.scale = 0.4\n"
        "- quantizer.distill.loss.student_cross_entropy = StudentCrossEntropy\n"
        "- quantizer.distill.loss.student_cross_entropy.weight = 1.0\n"
        "+ quantizer.distill.loss.branch_energies = BranchEnergies\n"
        "+ quantizer.distill.loss.branch_energies.weight = 4000.0\n"
        "- quantizer.distill.gradient = Once\n"
        "+ quantizer.distill.gradient = Perturbed\n"
        "+ quantizer.distill.gradient.epsilon = 0.01\n"
        "+ quantizer.distill.gradient.moved = None\n"
        "+ quantizer.distill.gradient.weight = 1.0\n"
        "+ quantizer.distill.gradient.beside = None\n"
    )


def test_a_plug_in_is_shown_on_its_host(capsys: pytest.CaptureFixture[str]):
    assert main(["show", "ait+qimera"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ait+qimera: It's All In the Teacher")
    assert "synthesizer.latents = SuperposedClasses" in lines
    assert "quantizer.distill.optimizer = Inundation" in lines


def test_models(capsys: pytest.CaptureFixture[str]):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "zoo:digits-resnet        1x8x8    10       17,462      98.52 %  scikit-learn's" in out
    assert "path/to/file.py:factory" in out
    assert main(["models", "--json"]) == 0
    zoo = json.loads(capsys.readouterr().out)["zoo"]
    assert zoo[0]["model"] == "zoo:digits-resnet"
    assert zoo[0]["parameters"] == 17_462


def test_quantize_sums_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["quantize", "zoo:digits-resnet", "--method", "zeroq", "--bits", "w8a8", "--data", "digits", *SMOKE]
    assert main([*words, "--out", str(tmp_path / "run"), "--seed", "3", "--set", "synthesizer.lr=0.25"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    facts = {line[:13].strip(): line[15:] for line in shown.out.splitlines()}
    assert facts["model"] == "zoo:digits-resnet"
    assert facts["bits"] == "W8A8"
    assert facts["seed"] == "3"
    assert facts["set"] == "synthesizer.lr=0.25"
    assert facts["float"].startswith("top-1 98.52 %")
    for name in ("protocol", "quantized", "drop", "agreement", "left in float", "bytes", "seconds", "peak memory"):
        assert facts[name]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"recipe", "student.safetensors", "metrics.json", "images.safetensors", "images.png"} <= names


def test_quantize_in_another_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["quantize", "zoo:digits-resnet", "--method", "zeroq", "--bits", "w4a4", *SMOKE, "--out"]
    assert main([*words, str(tmp_path / "short"), "--precision", "bfloat16"]) == 0
    assert "precision      bfloat16" in capsys.readouterr().out.splitlines()
    assert json.loads((tmp_path / "short" / "metrics.json").read_text())["precision"] == "bfloat16"
    assert main([*words, str(tmp_path / "long")]) == 0
    assert "precision" not in capsys.readouterr().out
    assert json.loads((tmp_path / "long" / "metrics.json").read_text())["precision"] == "float32"


def test_quantize_says_when_nothing_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["quantize", "zoo:digits-resnet", "--method", "dfq", "--bits", "w8a8", *SMOKE]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "not measured: no --data" in out
    assert re.search(
        r"^estimate  +a drop of [\d.]+ points \([\d.]+ to [\d.]+\), without data: a guess", out, re.MULTILINE
    )
    assert re.search(
        r"^ +agrees with the teacher on [\d.]+ % of 8 class images, [\d.]+ % of 8 dead leaves$", out, re.MULTILINE
    )
    assert main([*words, "--out", str(tmp_path / "other"), "--no-estimate"]) == 0
    assert "without data" not in capsys.readouterr().out


def test_evaluate_a_run_agrees_with_its_metrics(run: Path, capsys: pytest.CaptureFixture[str]):
    metrics = json.loads((run / "metrics.json").read_text())
    assert main(["evaluate", str(run), "--data", "digits", "--json", "--device", "cpu"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {key: facts[key] for key in ("float", "quantized", "drop")} == metrics["accuracy"]
    assert main(["evaluate", str(run), "--data", "digits", "--device", "cpu"]) == 0
    assert "agreement  " in capsys.readouterr().out


def test_evaluate_a_network(capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "zoo:digits-resnet", "--data", "digits", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["images  540", "top-1   98.52 %"]


def test_a_network_of_ones_own_from_another_folder(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    words = ["quantize", "tiny.py:build", "--method", "nearest", "--bits", "w4a32", *SMOKE]
    assert main([*words, "--input-shape", "1,8,8", "--mean", "0.3", "--std", "0.4", "--out", "run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bits"] == "W4A32"
    assert facts["mean"] == [0.3]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["evaluate", "../run", "--data", "digits", "--device", "cpu"]) == 0


@pytest.mark.parametrize("out", ["images.npz", "images"])
def test_synthesize(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["synthesize", "zoo:digits-resnet", "--method", "zeroq", "--samples", "5", *SMOKE]
    assert main([*words, "--out", str(tmp_path / out)]) == 0
    assert "samples  5" in capsys.readouterr().out
    if out == "images":
        assert len(list((tmp_path / out).glob("*.png"))) == 5
        assert main([*words, "--out", str(tmp_path / out)]) == 2  # what is there stays
        return
    with np.load(tmp_path / out) as file:
        assert file["x"].dtype == np.uint8
        assert file["x"].shape == (5, 8, 8, 1)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zsq.api.quantize", interrupt)
    words = ["quantize", "zoo:digits-resnet", "--method", "zeroq", "--bits", "w4a4", "--out", str(tmp_path / "run")]
    assert main(words) == 130
    assert capsys.readouterr().err == "zsq: interrupted; the same command continues where it stopped\n"


def test_progress_is_one_line_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    words = ["synthesize", "zoo:digits-resnet", "--method", "zeroq", "--samples", "4", *SMOKE]
    assert main([*words, "--out", str(tmp_path / "images.npz")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "model    zoo:digits-resnet"


# --- bad input ----------------------------------------------------------------------------------------------------


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr with which ``words`` are refused."""
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("zsq: error: ")
    assert shown.err.count("\n") == 1
    return shown.err.removeprefix("zsq: error: ").rstrip()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--method", "geni"), "no method 'geni' (did you mean 'genie'?): there is dfq,"),
        (("--set", "synthesizer.step=3"), "no 'step' in 'synthesizer.step': OptimizeImages has loss"),
        (("--set", "synthesizer.steps=many"), "synthesizer.steps must be a whole number, got 'many'"),
        (("--set", "synthesizer.steps=0"), "must be at least 1, got 0"),
        (("--set", "synthesizer.steps"), "write path=value"),
        (("--preset", "best"), "zeroq has no preset 'best': there is paper"),
        (("--protocol", "all"), "no protocol 'all': there is minmax-ptq"),
        (("--effort", "none"), "'none' is not one of 'smoke', 'fast', 'paper'"),
        (("--bits", "w1a4"), "weights can have 2 to 8 bits, or 32 for float, got 1"),
        (("--bits", "w9a9"), "weights can have 2 to 8 bits, or 32 for float, got 9"),
        (("--bits", "4x4"), "bits are written like w4a4 (weights, activations), got '4x4'"),
        (("--input-shape", "3,x"), "write numbers with commas, such as 3,32,32"),
        (("--input-shape", "8,8"), "it must be (C, H, W)"),
        (("--input-shape", "3,8,8"), "does not run on images (1, 3, 8, 8)"),
        (("--mean", "0.1,0.2"), "takes 1 channels"),
        (("--std", "0"), "std above 0"),
        (("--precision", "float16"), "'float16' is not one of 'float32', 'bfloat16'"),
        (("--method", "genie+gdfq"), "'genie' takes no host: plug-ins are synq, ait"),
        (("--method", "ait+zeroq"), "ait changes how a student is distilled, and zeroq does not distill"),
        (("--device", "cuda:99"), "no device 'cuda:99' here: there is cpu"),
        (("--device", "abacus"), "no device 'abacus' here"),
        (("--threads", "0"), "'--threads'"),
        (("--seed", "one"), "'--seed'"),
        (("--data", "nowhere.zip"), "no data at nowhere.zip"),
        (("--checkpoint", "nowhere.pt"), "no checkpoint at nowhere.pt"),
        (("--fast",), "No such option: --fast"),
    ],
)
def test_bad_options(words: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good = ["quantize", "zoo:digits-resnet", "--method", "zeroq", "--bits", "w4a4", "--out", str(tmp_path / "run")]
    assert says in refused([*good, *SMOKE, *words], capsys)
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("resnet18", "no network 'resnet18': the forms are zoo:NAME"),
        ("zoo:digits", "no network 'digits' in the zoo: it has digits-resnet"),
        ("nowhere.py:build", "no file nowhere.py"),
        ("no.such.package:build", "no module 'no'"),
    ],
)
def test_bad_models(model: str, says: str, capsys: pytest.CaptureFixture[str]):
    assert says in refused(["evaluate", model, "--data", "digits"], capsys)


@pytest.mark.parametrize(
    ("factory", "method", "says"),
    [
        ("bild", "nearest", "has no 'bild': it has build"),
        ("plain", "zeroq", "this network has none; methods that fit: squant"),
        ("noisy", "nearest", "changes its output in eval mode"),
    ],
)
def test_networks_that_do_not_fit(
    factory: str, method: str, says: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["quantize", f"{tiny}:{factory}", "--method", method, "--bits", "w4a4", "--out", str(tmp_path / "run")]
    assert says in refused([*words, *SMOKE, "--input-shape", "1,8,8"], capsys)


def test_a_network_of_ones_own_needs_a_shape(tiny: str, capsys: pytest.CaptureFixture[str]):
    assert "--input-shape C,H,W" in refused(["evaluate", f"{tiny}:build", "--data", "digits"], capsys)


def test_checkpoints_that_do_not_fit(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["evaluate", f"{tiny}:build", "--data", "digits", "--input-shape", "1,8,8", "--checkpoint"]
    torch.save({"0.weight": torch.zeros(4, 1, 5, 5)}, tmp_path / "shape.pt")
    assert "0.weight is (4, 1, 5, 5), not (4, 1, 3, 3)" in refused([*words, str(tmp_path / "shape.pt")], capsys)
    torch.save({"0.weight": torch.zeros(4, 1, 3, 3), "head.bias": torch.zeros(1)}, tmp_path / "keys.pt")
    said = refused([*words, str(tmp_path / "keys.pt")], capsys)
    assert "missing (0.bias" in said
    assert "1 unexpected (head.bias)" in said
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Path("/")))
    assert "is not a file of tensors" in refused([*words, str(tmp_path / "code.pt")], capsys)
    (tmp_path / "cut.safetensors").write_bytes(b"\x20")
    assert "is not a file of tensors" in refused([*words, str(tmp_path / "cut.safetensors")], capsys)


def test_weights_that_are_no_numbers(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["evaluate", f"{tiny}:build", "--data", "digits", "--input-shape", "1,8,8"]
    from zsq.nets.load import load_network

    state = load_network(f"{tiny}:build", input_shape=(1, 8, 8)).module.state_dict()
    state["4.bias"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    assert "4.bias of build has NaN" in refused([*words, "--checkpoint", str(tmp_path / "nan.pt")], capsys)


def test_data_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty.zip").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    x = np.zeros((3, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "many.npz", x=x, y=np.array([0, 1, 11]))
    np.savez(tmp_path / "good.npz", x=x, y=np.array([0, 1, 2]))
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name, says in {
        "missing.zip": "no data at",
        "empty.zip": "cannot be read",
        "folder": "no images in",
        "cut.npz": "cannot be read",
        "many.npz": "a label is 11, the network has 10 classes",
    }.items():
        words = ["quantize", "zoo:digits-resnet", "--method", "nearest", "--bits", "w4a4", *SMOKE]
        out = tmp_path / f"run-{name}"
        assert says in refused([*words, "--out", str(out), "--data", str(tmp_path / name)], capsys)
        assert not (out / "identity.json").exists()  # known before any work
        assert says in refused(["evaluate", "zoo:digits-resnet", "--data", str(tmp_path / name)], capsys)


def test_folders_that_cannot_be_used(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["quantize", "zoo:digits-resnet", "--bits", "w4a4", *SMOKE, "--out"]
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert "holds another run (method nearest, not zeroq" in refused([*words, str(run), "--method", "zeroq"], capsys)
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    (tmp_path / "file").write_text("mine")
    assert "cannot create" in refused([*words, str(tmp_path / "file" / "run"), "--method", "zeroq"], capsys)
    assert "is not a run folder and not empty" in refused([*words, str(tmp_path), "--method", "zeroq"], capsys)
    torch.save({"mine": torch.zeros(1)}, tmp_path / "checkpoint.pt")
    assert "checkpoint.pt is no checkpoint of a run" in refused([*words, str(tmp_path), "--method", "zeroq"], capsys)
    assert "holds no finished run" in refused(["evaluate", str(tmp_path), "--data", "digits"], capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--method", "dfq"), "dfq makes no images; methods that do: squant, zeroq"),
        (("--samples", "0"), "'--samples'"),
        (("--out", "images.jpg"), "give a name that ends in .npz"),
    ],
)
def test_images_that_cannot_be_made(
    words: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    good = ["synthesize", "zoo:digits-resnet", "--method", "zeroq", "--samples", "4", "--out", str(tmp_path / "i.npz")]
    assert says in refused([*good, *SMOKE, *words], capsys)


def test_unknown_words(capsys: pytest.CaptureFixture[str]):
    assert refused(["quantise"], capsys).startswith("No such command 'quantise'")
    assert refused(["show"], capsys) == "Missing argument 'METHOD'."
    assert "no method 'a'" in refused(["diff", "a", "b"], capsys)


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    words = ["quantize", "zoo:digits-resnet", "--method", "nearest", "--bits", "w4a4", "--protocol", "deploy", *SMOKE]
    assert main([*words, "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["export", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = (run / "ort-x86.onnx").stat().st_size
    assert lines[:3] == [
        "target ort-x86",
        "22 of 22 layers and matrix products compute in integers",
        "20 weights are stored in 4 bits",
    ]
    assert lines[-1] == f"wrote {run / 'ort-x86.onnx'} ({size:,} bytes)"
    assert main(["export", str(run)]) == 2
    assert "ort-x86.onnx exists: choose another name, or overwrite it with --force" in capsys.readouterr().err
    assert main(["export", str(run), "--target", "pt2e-x86", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["out"] == str(run / "pt2e-x86.pt2")
    assert facts["bytes"] == (run / "pt2e-x86.pt2").stat().st_size
    assert len(facts["integer"]) == 22


def test_a_file_is_written_for_a_reader_that_leaves(run: Path, tmp_path: Path):
    out = tmp_path / "a.onnx"
    read_nothing(["export", str(run), "--out", str(out)])
    assert out.stat().st_size > 1000


def test_export_says_what_stays_float_before_it_refuses_to_write(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(run), "--out", str(run / "metrics.json" / "a.onnx")]) == 2
    said = capsys.readouterr()
    assert "9 of 22 layers and matrix products compute in integers" in said.out
    assert "stem.0 stays float: it reads images in float" in said.out
    assert said.err.startswith("zsq: error: cannot write")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{run}", "--target", "ort"], "zsq: error: no target 'ort' (did you mean 'ort-x86'?)"),
        (
            ["{run}", "--target", "tensorrt"],
            "cannot hold the 4-bit activations of stem.2: quantize with 8-bit activations",
        ),
        (["{run}", "--out", "a.bin"], "zsq: error: ort-x86 writes .onnx files: a.bin has another suffix"),
        (["nowhere"], "zsq: error: nowhere holds no finished run"),
    ],
)
def test_wrong_exports(words, line, run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", *(word.format(run=run) for word in words)]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


# --- comparisons ------------------------------------------------------------------------------------------------

COMPARE = ("compare", "zoo:digits-resnet", "--methods", "squant", "--bits", "w4a4,w3a3", "--data", "digits", *SMOKE)
LOCAL = ("--engine", "local")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    assert main([*COMPARE, *LOCAL, "--out", str(folder)]) == 0
    return folder


def test_compare_ends_with_the_table_and_table_prints_it_again(compared, capsys):
    assert main([*COMPARE, *LOCAL, "--out", str(compared)]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0] == "`zoo:digits-resnet` under `minmax-ptq-inputs`, effort smoke, 540 images of digits:"
    assert [line.split(" | ")[0] for line in lines[2:7]] == ["| method", "|---|--:|--:|--:|--:|", *NAMES]
    assert main(["table", str(compared)]) == 0
    assert capsys.readouterr().out == shown
    assert main(["table", str(compared / "cells.jsonl"), "--only", "bits=w3a3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [list(line["entries"]) for line in facts[0]["lines"]] == [["W3A3"], ["W3A3"]]


NAMES = ("| float", "| `nearest`", "| `squant`")


def test_compare_plan_lists_the_cells_and_runs_none(compared, tmp_path, capsys):
    words = [*COMPARE, "--seeds", "0,1", "--plan", "--out"]
    assert main([*words, str(compared)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["digits-resnet/float", "done"]
    assert lines[2].split() == ["digits-resnet/nearest/w4a4/minmax-ptq-inputs/seed1", "due"]
    assert lines[-1] == "4 of 9 cells to do"
    assert main([*words, str(tmp_path / "new"), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out).values()) == {"due"}
    assert not (tmp_path / "new").exists()


def test_compare_counts_what_failed(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise UnsupportedModel("it cannot be")

    monkeypatch.setattr("zsq.compare.work.quantize", fail)
    assert main([*COMPARE, *LOCAL, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(
        "zsq: 4 of 5 cells failed, the same command tries them again: digits-resnet/nearest/w4a4"
    )
    assert "Failed: `squant` W3A3, seed 0: it cannot be." in said.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--seeds", "0,x"), "--seeds 0,x: write numbers with commas"),
        (("--seeds", ""), "--seeds : write numbers with commas"),
        ((*LOCAL, "--workers", "2"), "--engine local has one worker"),
        (("--workers", "0"), "--workers"),
        (("--address", "auto"), "--address is that of a Ray cluster"),
        (("--methods", ","), "a comparison needs methods"),
        (("--protocol", "here"), "no protocol 'here'"),
        (("--calibration", "digits"), "digits is what is measured on"),
    ],
)
def test_mistakes_in_a_comparison(tmp_path, capsys, words, says):
    genie = [word if word != "squant" else "genie" for word in COMPARE]
    assert says in refused([*genie, *words, "--out", str(tmp_path)], capsys)


def test_table_updates_a_file(compared, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"<!-- zsq table {compared} -->\n<!-- end -->\n")
    assert main(["table", "--update", str(page)]) == 0
    assert capsys.readouterr().out == f"updated {page}\n"
    assert "| `squant` |" in page.read_text()
    assert main(["table", "--update", str(page)]) == 0
    assert capsys.readouterr().out == ""
    assert "cannot be read" in refused(["table", str(tmp_path / "gone")], capsys)
    assert "cannot be read" in refused(["table", "--update", str(tmp_path / "gone.md")], capsys)
