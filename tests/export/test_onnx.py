"""The ONNX file: valid, of integers, run in integers, and right."""

import json
from collections import Counter
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import images, result_of
from onnx import TensorProto, numpy_helper

from zsq.export import TARGETS, plan
from zsq.export.lower import lower
from zsq.export.onnx import Onnx, narrowed, onnx_bytes

CASES = [("resnet", "w8a8"), ("resnet", "w4a8"), ("resnet", "w4a4"), ("resnet", "w2a3")]
CASES += [
    ("mobilenet", "w8a8"),
    ("mobilenet", "w4a4"),
    ("branches", "w4a4"),
    ("dense", "w4a4"),
    ("tokens", "w8a8"),
    ("tokens", "w4a4"),
]


@cache
def file_of(network: str, bits: str) -> bytes:
    target = TARGETS["ort-x86"]
    student = result_of(network, bits).student
    return onnx_bytes(lower(student, target, Onnx()), (3, 8, 8), target, {"zsq.bits": bits})


def session(content: bytes, folder=None) -> onnxruntime.InferenceSession:
    """Optimised, with the optimised graph in ``folder``; or as the file says."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if folder is None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(folder / "optimized.onnx")
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def kernels(content: bytes, folder) -> Counter:
    session(content, folder)
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize(("network", "bits"), CASES)
def test_the_file_is_valid_and_says_one_opset(network, bits):
    model = onnx.load_from_string(file_of(network, bits))
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]
    assert model.ir_version == 10
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)  # no paths of this machine


@pytest.mark.parametrize(("network", "bits"), CASES)
def test_every_layer_runs_in_integers(network, bits, tmp_path):
    written = Counter(node.op_type for node in onnx.load_from_string(file_of(network, bits)).graph.node)
    run = kernels(file_of(network, bits), tmp_path)
    patches = network == "tokens"  # the one convolution that stays
    assert run["Conv"] + run["FusedConv"] == patches
    assert run["Gemm"] + run["MatMul"] == 0
    assert run["QLinearConv"] == written["Conv"] - patches
    assert run["QGemm"] == written["Gemm"] == 1
    assert run["MatMulIntegerToFloat"] + run["QLinearMatMul"] == written["MatMul"] == (6 if patches else 0)
    assert run["Relu"] == 0


def test_pools_sums_and_concatenations_run_in_integers(tmp_path):
    run = kernels(file_of("branches", "w4a4"), tmp_path)
    assert (run["QLinearAdd"], run["QLinearConcat"], run["QLinearAveragePool"]) == (1, 1, 1)
    assert run["MaxPool"] + run["NhwcMaxPool"] == 1
    assert kernels(file_of("resnet", "w4a4"), tmp_path)["QLinearGlobalAveragePool"] == 1
    assert run["Add"] + run["Concat"] + run["AveragePool"] == 0


@pytest.mark.parametrize(("network", "bits"), CASES)
def test_the_file_computes_what_the_student_does(network, bits, tmp_path):
    x, content = images(), file_of(network, bits)
    expected = result_of(network, bits).student(x).numpy()
    noise = {
        kind: signal_to_noise(expected, each.run(None, {"images": x.numpy()})[0])
        for kind, each in (("as written", session(content)), ("optimised", session(content, tmp_path)))
    }
    # A value at the border of two grid points falls on either side: one step, which is 17 times larger at 4 bits.
    assert min(noise.values()) > (30 if bits.endswith("a8") else 15), noise


def signal_to_noise(expected: np.ndarray, found: np.ndarray) -> float:
    """In dB."""
    return float(10 * np.log10(np.sum(expected**2) / np.sum((expected - found) ** 2)))


def test_any_batch_size_gives_the_same_numbers(tmp_path):
    run, x = session(file_of("resnet", "w4a4"), tmp_path), images(5).numpy()
    together = run.run(None, {"images": x})[0]
    alone = np.concatenate([run.run(None, {"images": each[None]})[0] for each in x])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("bits", ["w4a4", "w2a3"])
def test_few_bits_are_stored_in_4_and_the_ends_in_8(bits):
    tensors = {t.name: t for t in onnx.load_from_string(file_of("resnet", bits)).graph.initializer}
    weights = {name: t.data_type for name, t in tensors.items() if name.endswith(".weight")}
    ends = [weights.pop("0.weight"), weights.pop("12.weight")]
    assert set(ends) == {TensorProto.INT8}
    assert set(weights.values()) == {TensorProto.INT4}
    student = result_of("resnet", bits).student
    for name in weights:
        quantizer = student.get_submodule(name.removesuffix(".weight")).parametrizations.weight[0]
        stored = numpy_helper.to_array(tensors[name]).astype(np.int64)
        np.testing.assert_array_equal(stored, quantizer.codes.numpy().astype(np.int64) + quantizer.low)


def test_narrowed_by_hand():
    codes, factor = narrowed(np.array([-128, 48, 0], dtype=np.int8))
    assert (codes.tolist(), factor) == ([-8, 3, 0], 16)
    assert narrowed(np.array([-128, 49], dtype=np.int8)) is None
    codes, factor = narrowed(np.zeros(2, dtype=np.int8))
    assert (codes.tolist(), factor) == ([0, 0], 1)


def test_biases_are_int32_at_exactly_both_scales():
    graph = onnx.load_from_string(file_of("resnet", "w4a4")).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    checked = 0
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            act, weight, bias = (makers[name] for name in node.input)
            assert constants[bias.input[0]].dtype == np.int32
            assert len(bias.input) == 2  # zero point 0
            assert makers[bias.input[1]].op_type == "Mul"
            assert sorted(makers[bias.input[1]].input) == sorted([act.input[1], weight.input[1]])
            checked += 1
    assert checked == 6


def test_what_the_file_says_of_itself(tmp_path):
    result = result_of("resnet", "w4a4")
    result.export(tmp_path / "a.onnx")
    said = {each.key: each.value for each in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert said["zsq.method"] == "nearest"
    assert said["zsq.bits"] == "W4A4"
    assert said["zsq.seed"] == "0"
    assert said["zsq.teacher"] == result.metrics["teacher"]
    assert said["zsq.target"] == "ort-x86"
    assert json.loads(said["zsq.mean"]) == result.metrics["mean"]
    assert json.loads(said["zsq.std"]) == result.metrics["std"]
    assert json.loads(said["zsq.input_shape"]) == [3, 8, 8]
    assert json.loads(said["zsq.versions"])["torch"] == torch.__version__


def test_the_same_student_gives_the_same_bytes():
    target = TARGETS["ort-x86"]
    graph = lower(result_of("mobilenet", "w4a4").student, target, Onnx())
    assert onnx_bytes(graph, (3, 8, 8), target, {"zsq.bits": "w4a4"}) == file_of("mobilenet", "w4a4")


def test_symmetric_int8_has_the_structure_that_tensorrt_asks_for():
    made = plan(result_of("resnet", "w8a8", "tensorrt").student, (3, 8, 8), "tensorrt", {})
    model = onnx.load_from_string(onnx_bytes(made.graph, (3, 8, 8), made.target, {}))
    onnx.checker.check_model(model, full_check=True)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    grids = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert {(constants[node.input[2]].dtype.name, int(constants[node.input[2]])) for node in grids} == {("int8", 0)}
    assert not any(node.op_type in ("Clip", "Cast") for node in model.graph.node)
    assert "not measured" in " ".join(made.lines())
