"""A graph of two layers and one product of activations, by hand."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from zsq.runtime.structure import (
    FloatLayer,
    Graph,
    Grid,
    Integers,
    bias_faults,
    grid_faults,
    integer_faults,
    not_between_integers,
    not_by_onnxruntime,
    not_by_openvino,
)

CONSTANTS = {
    "act_scale": np.float32(0.5),
    "act_zero": np.uint8(3),
    "low": np.uint8(0),
    "high": np.uint8(15),
    "conv.weight": np.array([[[[1]]], [[[-2]]]], np.int8),
    "factor": np.array(16, np.int32),
    "weight_scale": np.float32([0.25, 0.125]),
    "weight_zero": np.zeros(2, np.int8),
    "conv.bias": np.int32([7, 8]),
    "bias_scale": np.float32([0.125, 0.0625]),  # 0.5 * 0.25, 0.5 * 0.125
}
WIDE = np.array([[[[16]]], [[[-32]]]], np.int8)


def model(**changes: np.generic | np.ndarray) -> onnx.ModelProto:
    """images, quantized and clipped -> conv, quantized -> conv.last (float weight); and its product with itself."""
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["images", "act_scale", "act_zero"], ["q"]),
        node("Clip", ["q", "low", "high"], ["clipped"]),
        node("DequantizeLinear", ["clipped", "act_scale", "act_zero"], ["x"]),
        node("Cast", ["conv.weight"], ["wide"], to=TensorProto.INT32),
        node("Mul", ["wide", "factor"], ["wider"]),
        node("Cast", ["wider"], ["narrow"], to=TensorProto.INT8),
        node("DequantizeLinear", ["narrow", "weight_scale", "weight_zero"], ["w"], axis=0),
        node("DequantizeLinear", ["conv.bias", "bias_scale"], ["b"], axis=0),
        node("Conv", ["x", "w", "b"], ["conv2d"], name="conv"),
        node("QuantizeLinear", ["conv2d", "act_scale", "act_zero"], ["q2"]),
        node("DequantizeLinear", ["q2", "act_scale", "act_zero"], ["y"]),
        node("Conv", ["y", "float.weight"], ["conv2d_1"], name="conv.last"),
        node("MatMul", ["y", "y"], ["matmul"], name="node_matmul"),
    ]
    values = {**CONSTANTS, "float.weight": np.ones((2, 2, 1, 1), np.float32), **changes}
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    return helper.make_model(helper.make_graph(nodes, "graph", [], [], constants))


def graph(**changes: np.generic | np.ndarray) -> Graph:
    return Graph(model(**changes))


GRIDS = [Grid(0.5, 3, 0, 15), Grid(0.5, 3, 0, 255)]


def test_a_bias_by_hand():
    assert bias_faults(graph()) == (1, {})
    _, faults = bias_faults(graph(bias_scale=np.float32([0.125, 0.06])))
    assert faults == {
        "conv": "the bias of conv has scale 0.06 in channel 1, where activation scale x weight scale is 0.0625 "
        "(1 of 2 channels differ)"
    }
    off_by_one = np.nextafter(np.float32([0.125, 0.0625]), np.float32(1))
    assert len(bias_faults(graph(bias_scale=off_by_one))[1]) == 1  # exactly, not nearly


def test_weights_of_four_bits_are_read_as_they_are_widened():
    found = graph()
    np.testing.assert_array_equal(found.weight(found.computing[0]), WIDE)
    wanted = Integers(WIDE, CONSTANTS["weight_scale"], CONSTANTS["conv.bias"])
    assert integer_faults(found, {"conv": wanted}) == []
    assert integer_faults(graph(factor=np.array(8, np.int32)), {"conv": wanted}) == [
        "the weight of conv is not that of the run"
    ]
    other = {"weight_scale": np.float32([0.25, 0.25])}
    assert integer_faults(graph(**other), {"conv": wanted}) == ["the weight of conv is not that of the run"]
    other = {"conv.bias": np.int32([7, 9])}
    assert integer_faults(graph(**other), {"conv": wanted}) == ["the bias of conv is not that of the run"]


def test_grids_by_hand():
    assert grid_faults(graph(), "uint8", GRIDS) == []
    says = grid_faults(graph(high=np.uint8(7)), "uint8", GRIDS)
    assert says == ["1 of the run's 2 grids are not in the file, such as Grid(scale=0.5, zero_point=3, low=0, high=15)"]
    says = grid_faults(graph(act_zero=np.uint8(20)), "uint8", GRIDS)
    assert says == ["the zero point 20 of activation act_scale lies outside its integers 0..15"]
    says = grid_faults(graph(act_zero=np.int8(3), low=np.int8(0), high=np.int8(15)), "uint8", GRIDS)
    assert says == ["2 of 2 activations are int8 (act_scale, act_scale): the kernels of the target take uint8"]
    says = grid_faults(graph(act_zero=np.int8(3), low=np.int8(0), high=np.int8(15)), "int8", GRIDS)
    assert "the zero point 3 of activation act_scale is not 0: the target is symmetric" in says
    assert grid_faults(graph(act_scale=np.float32(0)), "uint8", GRIDS)[0].endswith("is not one positive constant")


def optimised(*kernels: tuple[str, str]) -> onnx.ModelProto:
    nodes = [helper.make_node(kind, [], [], name=name) for kind, name in kernels]
    return helper.make_model(helper.make_graph(nodes, "graph", [], []))


def test_what_onnxruntime_leaves_in_float():
    kernels = [("QLinearConv", "conv_token_1"), ("FusedConv", "conv.last"), ("QLinearMatMul", "node_matmul_token_3")]
    reason = "its weight is not quantized"
    assert not_by_onnxruntime(graph(), optimised(*kernels)) == [FloatLayer("conv.last", reason)]
    kernels[0] = ("MatMulNBits", "conv_token_1")  # multiplies floats by weights of few bits
    assert FloatLayer("conv", "ONNX Runtime took no integer kernel") in not_by_onnxruntime(graph(), optimised(*kernels))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("MatMul", "OpenVINO multiplies its activations in float"),
        ("Subgraph", "OpenVINO fuses it into a kernel that does not tell"),
    ],
)
def test_what_openvino_leaves_in_float(kind: str, reason: str):
    layers = [
        {"type": "Convolution", "precision": "u8", "names": "conv/WithoutBiases,conv"},
        {"type": "Convolution", "precision": "f32", "names": "conv.last"},
        {"type": kind, "precision": "f32", "names": "node_matmul,node_softmax"},
    ]
    conv, product = not_by_openvino(graph(), layers)
    assert conv == FloatLayer("conv.last", "its weight is not quantized")
    assert product == FloatLayer("matmul", reason, fault=False)
    layers[0]["precision"] = "bf16"
    assert not_by_openvino(graph(), layers)[0] == FloatLayer("conv", "OpenVINO took no integer kernel")


def test_what_is_not_between_integers():
    assert not_between_integers(graph()) == [FloatLayer("conv.last", "its weight is not quantized")]
