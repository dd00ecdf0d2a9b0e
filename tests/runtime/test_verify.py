"""Each planted fault, the sentence that tells of it, and the exit code."""

import json
from collections.abc import Callable
from pathlib import Path

import exported as plant
import numpy as np
import onnx
import pytest
import tiny
import torch
from exported import Exported

from zsq.api import quantize
from zsq.cli import main
from zsq.core import CheckpointError
from zsq.evaluate import Images
from zsq.runtime import sessions
from zsq.runtime.verify import Verification, verify


def faults(found: Verification) -> dict[str, str]:
    return {check.name: " / ".join(check.says) for check in found.checks if check.passed is False}


@pytest.fixture(scope="module")
def good(exported: Exported) -> Verification:
    pixels = torch.randint(0, 256, (40, 8, 8, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return verify(exported.file, exported.run, data=Images(pixels, torch.arange(40) % 5))


def test_a_right_file_passes(good: Verification):
    assert good.passed
    names = [check.name for check in good.checks]
    assert names == [
        "file",
        "integers",
        "biases",
        "grids",
        "kernels of ONNX Runtime",
        "kernels of OpenVINO",
        "numbers, 8 images of the run",
        "numbers, 40 images of the data",
    ]
    says = {check.name: check.says[0] for check in good.checks}
    for runtime in ("ONNX Runtime", "OpenVINO"):
        assert says[f"kernels of {runtime}"] == "6 of 6 layers (5 Conv, 1 Gemm) run in integers"
    assert says["biases"] == "6 in int32, all at activation scale x weight scale"


def test_numbers_are_those_of_every_runtime_beside_both_networks(good: Verification, exported: Exported):
    exact, simulation, *runtimes = good.numbers["40 images of the data"]
    assert [each.name for each in runtimes] == ["ONNX Runtime", "ONNX Runtime, unoptimised", "OpenVINO"]
    assert exact.snr_float == simulation.snr_simulation == 200
    assert exact.agrees_simulation == simulation.agrees_float
    for each in runtimes:
        assert each.snr_simulation > 10
        assert each.top1 is not None
        assert abs(each.snr_float - simulation.snr_float) < 2


@pytest.mark.parametrize(
    ("change", "check", "says"),
    [
        (plant.double_bias_scale("4"), "biases", "the bias of 4 has scale"),
        (plant.double_bias_scale("4"), "kernels of ONNX Runtime", "4 is left in float: its bias has another scale"),
        (plant.double_bias_scale("12"), "biases", "where activation scale x weight scale is"),
        (plant.clip_in_float("4"), "kernels of ONNX Runtime", "4 is left in float: a float Clip stands between it and"),
        (plant.sign_activations, "grids", "activations are int8"),
        (plant.sign_activations, "grids", "the kernels of the target take uint8"),
        (plant.read_float("7"), "kernels of ONNX Runtime", "7 is left in float: its input is not quantized"),
        (plant.read_float("7"), "kernels of OpenVINO", "7 is left in float: its input is not quantized"),
    ],
    ids=["bias", "bias kernel", "bias of Gemm", "clip", "int8", "int8 what to do", "float", "float on OpenVINO"],
)
def test_a_planted_fault_fails_with_its_sentence(
    change: Callable[[onnx.ModelProto], None], check: str, says: str, exported: Exported, tmp_path: Path
):
    found = verify(exported.changed(change, tmp_path), exported.run)
    assert not found.passed
    assert says in faults(found)[check]


def test_one_wrong_weight_is_found(exported: Exported, tmp_path: Path):
    def change(model: onnx.ModelProto) -> None:
        dequantize = plant.made_by(model, plant.node_called(model, "0").input[1])
        codes = plant.constant(model, dequantize.input[0]).copy()
        codes.flat[0] += 1 if codes.flat[0] < 100 else -1
        plant.replace_input(model, dequantize, 0, codes)

    assert (
        "the weight of 0 is not that of the run"
        in faults(verify(exported.changed(change, tmp_path), exported.run))["integers"]
    )


def test_wrong_grids_are_found(exported: Exported, tmp_path: Path):
    def rescale(model: onnx.ModelProto) -> None:
        node = next(each for each in model.graph.node if each.op_type == "QuantizeLinear")
        plant.replace_input(model, node, 1, np.float32(1.01) * plant.constant(model, node.input[1]))

    def shift(model: onnx.ModelProto) -> None:
        clip = next(each for each in model.graph.node if each.op_type == "Clip")
        quantize = plant.made_by(model, clip.input[0])
        plant.replace_input(model, quantize, 2, np.asarray(200, np.uint8))

    says = faults(verify(exported.changed(rescale, tmp_path), exported.run))["grids"]
    assert says.startswith("1 of the run's 9 grids are not in the file, such as Grid(scale=")
    says = faults(verify(exported.changed(shift, tmp_path), exported.run))["grids"]
    assert "the zero point 200 of activation _2 lies outside its integers 0..15" in says


def test_numbers_alone_find_what_no_structure_shows(exported: Exported, tmp_path: Path):
    def change(model: onnx.ModelProto) -> None:
        pool = next(each for each in model.graph.node if each.op_type == "GlobalAveragePool")
        add = onnx.helper.make_node("Add", [pool.output[0], pool.output[0]], ["twice"], name="twice")
        model.graph.node.insert(list(model.graph.node).index(pool) + 1, add)
        for node in model.graph.node:
            if pool.output[0] in node.input and node.name != "twice":
                node.input[:] = ["twice" if name == pool.output[0] else name for name in node.input]

    found = faults(verify(exported.changed(change, tmp_path), exported.run))
    assert set(found) == {"numbers, 8 images of the run"}
    assert "ONNX Runtime is " in found["numbers, 8 images of the run"]
    assert "dB from the float network, the simulation" in found["numbers, 8 images of the run"]


def test_what_the_checker_refuses_reaches_no_runtime(exported: Exported, tmp_path: Path):
    def change(model: onnx.ModelProto) -> None:
        plant.node_called(model, "4").op_type = "Convolve"

    found = verify(exported.changed(change, tmp_path), exported.run)
    assert [check.name for check in found.checks] == ["file"]
    assert faults(found)["file"].startswith("the ONNX checker refuses it: ")


def test_a_missing_openvino_is_said(exported: Exported, monkeypatch: pytest.MonkeyPatch):
    find = sessions.find_spec
    monkeypatch.setattr(sessions, "find_spec", lambda name: None if name == "openvino" else find(name))
    found = verify(exported.file, exported.run)
    assert found.passed
    check = next(each for each in found.checks if each.name == "OpenVINO")
    assert check.passed is None
    assert check.says == ("not looked at, because it is not installed",)


def test_a_run_without_images_is_compared_on_noise(tmp_path: Path):
    result = quantize(tiny.mobile(), "dfq", "w8a8", protocol="deploy", out=tmp_path / "run", **tiny.settings("dfq"))
    result.export(tmp_path / "mobile.onnx")
    found = verify(tmp_path / "mobile.onnx", tmp_path / "run", model=tiny.mobile())
    assert faults(found) == {}
    assert list(found.numbers) == ["64 images of Gaussian noise (the run made none)"]


def test_what_is_float_by_plan_is_no_fault(tmp_path: Path):
    words = {"protocol": "deploy", "out": tmp_path / "run", **tiny.settings("nearest")}
    quantize(tiny.plain(), "nearest", "w8a32", **words).export(tmp_path / "plain.onnx")
    found = verify(tmp_path / "plain.onnx", tmp_path / "run", model=tiny.plain())
    assert faults(found) == {}
    for runtime in ("ONNX Runtime", "OpenVINO"):
        kernels = next(check for check in found.checks if check.name == f"kernels of {runtime}")
        assert kernels.says[0] == "0 of 3 layers (2 Conv, 1 Gemm) run in integers"
        assert kernels.says[1] == "0 is float by plan: it reads images in float"


def test_openvinos_own_file_is_verified_on_openvino(tmp_path: Path):
    words = {"protocol": "openvino", "out": tmp_path / "run", **tiny.settings("nearest")}
    quantize(tiny.cnn(), "nearest", "w4a8", **words).export(tmp_path / "tiny.xml", "openvino")
    found = verify(tmp_path / "tiny.xml", tmp_path / "run", model=tiny.cnn())
    assert faults(found) == {}
    assert [check.name for check in found.checks] == ["kernels of OpenVINO", "numbers, 8 images of the run"]
    assert found.checks[0].says == ("6 of 6 layers (5 Conv, 1 Gemm) run in integers",)
    weights = (tmp_path / "tiny.bin").read_bytes()
    (tmp_path / "tiny.bin").write_bytes(weights[:-100])
    broken = faults(verify(tmp_path / "tiny.xml", tmp_path / "run", model=tiny.cnn()))
    assert broken["OpenVINO"].startswith("OpenVINO cannot load the file: ")
    whole = (tmp_path / "tiny.xml").read_bytes()
    for size in range(0, len(whole) - 20, 4001):
        (tmp_path / "tiny.xml").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="is no complete file of OpenVINO"):
            verify(tmp_path / "tiny.xml", tmp_path / "run", model=tiny.cnn())


def test_a_file_for_tensorrt_is_checked_by_structure(tmp_path: Path):
    words = {"protocol": "tensorrt", "out": tmp_path / "run", **tiny.settings("nearest")}
    quantize(tiny.cnn(), "nearest", "w8a8", **words).export(tmp_path / "tiny.onnx", "tensorrt")
    found = verify(tmp_path / "tiny.onnx", tmp_path / "run", model=tiny.cnn())
    assert faults(found) == {}
    check = next(check for check in found.checks if check.name == "structure for tensorrt")
    assert check.says == ("6 of 6 layers (5 Conv, 1 Gemm) read integers; not run on that target here",)
    bent = plant.changed(tmp_path / "tiny.onnx", plant.read_float("7"), tmp_path)
    broken = faults(verify(bent, tmp_path / "run", model=tiny.cnn()))
    assert "7 is left in float: its input is not quantized" in broken["structure for tensorrt"]


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_json(exported: Exported, capsys: pytest.CaptureFixture[str]):
    words = ["verify", str(exported.file), "--run", str(exported.run)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "kernels of ONNX Runtime       pass  6 of 6 layers (5 Conv, 1 Gemm) run in integers" in shown
    assert shown.endswith("\nverified\n")
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["passed"] is True
    assert facts["about"]["bits"] == "W4A4"
    assert len(facts["numbers"]["8 images of the run"]) == 5


def test_the_command_fails_with_1(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = exported.changed(plant.double_bias_scale("12"), tmp_path)
    assert main(["verify", str(file), "--run", str(exported.run)]) == 1
    shown = capsys.readouterr().out
    assert "biases                        FAIL  the bias of 12 has scale" in shown
    assert shown.endswith("\nFAILED\n")


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err


def test_bad_input_is_refused_in_a_line(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text.onnx").write_text("hello\n")
    (tmp_path / "empty.onnx").touch()
    other = exported.changed(lambda model: setattr(model.metadata_props[0], "value", "x"), tmp_path)
    for file, says in {
        tmp_path / "text.onnx": "is no complete ONNX file",
        tmp_path / "empty.onnx": "is no complete ONNX file",
        tmp_path / "none.onnx": "cannot be read (No such file or directory)",
        tmp_path: "is none of .onnx, .xml",
        exported.float_file: "was not exported by zsq",
        other: "was exported from another run",
    }.items():
        assert says in refused(["verify", str(file), "--run", str(exported.run)], capsys)
    assert "holds no finished run" in refused(["verify", str(exported.file), "--run", str(tmp_path)], capsys)
    words = ["verify", str(exported.file), "--run", str(exported.run), "--data", "none.zip"]
    assert "no data at none.zip" in refused(words, capsys)


def test_a_truncated_file_is_refused_wherever_it_ends(exported: Exported, tmp_path: Path):
    whole, cut = exported.file.read_bytes(), tmp_path / "cut.onnx"
    for size in [*range(0, len(whole), 997), *range(len(whole) - 700, len(whole), 13)]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            verify(cut, exported.run)


def test_a_missing_runtime_is_refused_with_its_pip_line(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sessions, "find_spec", lambda name: None if name == "onnxruntime" else name)
    line = refused(["verify", str(exported.file), "--run", str(exported.run)], capsys)
    assert line == "zsq: error: onnxruntime is not installed: pip install 'zsq[ort]'\n"
