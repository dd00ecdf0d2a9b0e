"""What is said before a file is written, and files that are written whole or not at all."""

import importlib.util
import os

import onnx
import openvino
import pytest
import tiny
import torch
from networks import images, result_of
from torch import nn

import zsq
from zsq.core import MissingExtra, RecipeError, RunError, UnsupportedModel
from zsq.export import TARGETS, plan


def plan_of(network, bits="w4a4", protocol="deploy", target="ort-x86"):
    about = {"zsq.protocol": protocol}
    return plan(result_of(network, bits, protocol).student, (3, 8, 8), target, about)


def test_a_fitting_student_runs_in_integers_altogether():
    made = plan_of("resnet")
    assert made.integer == ("0", "3.body.0", "3.body.3", "4", "7", "12")
    assert made.floating == {}
    assert made.lines() == [
        "6 of 6 layers and matrix products compute in integers",
        "4 weights are stored in 4 bits",
        f"speed of integers: {TARGETS['ort-x86'].integer}",
    ]


def test_a_student_of_another_placement_says_what_stays_float_and_what_to_do():
    made = plan_of("resnet", "w4a4", "minmax-ptq")
    assert made.floating == {
        "0": "it reads images in float",
        "3.body.3": "add reads it in float",
        "12": "it reads 11 in float",
    }
    said = made.lines()
    assert "3.body.3 stays float: add reads it in float" in said
    assert said[-1] == "quantizers where ort-x86 wants them: --protocol ort-x86"
    assert any(line.startswith("speed of what stays float: slower") for line in said)
    others = plan_of("resnet", "w4a4", "minmax-ptq", "openvino").floating  # needs no quantized output
    assert set(others) == {"0", "12"}


def test_what_was_planned_is_what_runs(tmp_path):
    import onnxruntime

    made = plan_of("resnet", "w4a4", "minmax-ptq")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(made.write(tmp_path / "a.onnx"), options, providers=["CPUExecutionProvider"])
    run = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert run.count("QLinearConv") + run.count("QGemm") == len(made.integer) == 3


def test_a_file_that_exists_stays_unless_forced(tmp_path):
    made, path = plan_of("resnet"), tmp_path / "new" / "a.onnx"
    made.write(path)
    path.write_bytes(b"mine")
    with pytest.raises(RunError, match=r"a\.onnx exists: choose another name, or overwrite it with --force"):
        made.write(path)
    assert path.read_bytes() == b"mine"
    made.write(path, force=True)
    onnx.checker.check_model(onnx.load(path))
    assert [each.name for each in path.parent.iterdir()] == ["a.onnx"]


def test_a_weights_file_that_exists_stays_too(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"mine")
    with pytest.raises(RunError, match=r"a\.bin exists"):
        plan_of("resnet", target="openvino").write(tmp_path / "a.xml")
    assert [each.name for each in tmp_path.iterdir()] == ["a.bin"]


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    made = plan_of("resnet")
    with pytest.raises(RecipeError, match=r"ort-x86 writes \.onnx files: .*a\.xml has another suffix"):
        made.write(tmp_path / "a.xml")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*file/a\.onnx"):
        made.write(tmp_path / "file" / "a.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*folder\.onnx"):
        made.write(tmp_path / "folder.onnx", force=True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RunError, match=r"cannot write .*a\.onnx: choose a place"):
        made.write(tmp_path / "a.onnx")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder.onnx"]


@pytest.mark.parametrize(
    ("target", "missing", "line"),
    [
        ("ort-x86", "onnxscript", r"ort-x86 needs onnxscript: pip install 'zsq\[onnx\]'"),
        ("openvino", "openvino", r"openvino needs openvino: pip install 'zsq\[openvino\]'"),
    ],
)
def test_a_missing_extra_has_its_pip_line(target, missing, line, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(MissingExtra, match=line):
        plan_of("resnet", target=target)


def test_a_target_that_does_not_exist():
    with pytest.raises(RecipeError, match=r"no target 'ort' \(did you mean 'ort-x86'\?\): there is ort-x86, openvino"):
        plan_of("resnet", target="ort")


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_an_operation_without_onnx_form_is_named_by_its_place(tmp_path):
    network = tiny.lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Bessel()), nn.Flatten(), nn.Linear(144, 5)))
    result = zsq.quantize(network, "nearest", "w4a4", protocol="deploy", **tiny.settings("nearest"))
    with pytest.raises(UnsupportedModel, match=r"special_bessel_j0 in 1\.0 has no ONNX form: put other operations"):
        result.export(tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_openvino_gets_the_same_numbers(tmp_path):
    made = plan_of("resnet", "w4a8", target="openvino")
    path = made.write(tmp_path / "a.xml")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.bin", "a.xml"]
    assert made.files(path) == [path, tmp_path / "a.bin"]
    model = openvino.Core().read_model(path)
    assert '"zsq.target": "openvino"' in model.get_rt_info("zsq").astype(str)
    run = openvino.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    expected, found = result_of("resnet", "w4a8").student(images()), torch.tensor(run(images().numpy())[0])
    assert 10 * torch.log10(expected.square().sum() / (expected - found).square().sum()) > 30  # dB
    facts = [
        {key: getattr(value, "value", value) for key, value in op.get_rt_info().items()}
        for op in run.get_runtime_model().get_ops()
    ]
    layers = [each["runtimePrecision"] for each in facts if each["layerType"] in ("Convolution", "FullyConnected")]
    assert len(layers) == 6
    assert set(layers) <= {"u8", "i8"}


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_an_exported_program_computes_what_the_student_does(bits, tmp_path):
    made = plan_of("resnet", bits, target="pt2e-x86")
    assert len(made.integer) == 6
    about = {"zsq.json": ""}
    program = torch.export.load(made.write(tmp_path / "a.pt2"), extra_files=about)
    assert '"zsq.target": "pt2e-x86"' in about["zsq.json"]
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("quantized_decomposed.dequantize_per_channel.default") == 6
    for count in (1, 64):
        torch.testing.assert_close(program.module()(images(count)), result_of("resnet", bits).student(images(count)))


def test_every_target_says_what_to_expect_and_what_not():
    for target in TARGETS.values():
        assert target.protocol.name == target.name
        assert target.cannot
        assert target.integer
        assert target.floating
