"""Lowering: no value changes, and what an integer kernel needs is there."""

from dataclasses import replace

import pytest
import tiny
import torch
from networks import ORT, Plain, images, nodes, result_of
from torch import nn
from torch.testing import assert_close

from zsq.core import UnsupportedModel
from zsq.export import TARGETS
from zsq.export.lower import IntegerActivation, IntegerBias, IntegerWeight, _widening, integer_weight, lower, why_float
from zsq.nets.graph import capture, layers, module_of
from zsq.quant.layers import edge_of
from zsq.quant.quantizers import activation_quantizers

BITS = ["w8a8", "w4a8", "w4a4", "w2a2"]
EVERY = ["resnet", "mobilenet", "branches", "dense", "tokens", "dead"]


def test_where_deployment_puts_quantizers():
    """The whole of a concatenation, not its parts; both sides of SiLU; of tokens what linears and products read."""
    found = {}
    for network in ("branches", "tokens"):
        graph = result_of(network).student
        edges = [edge_of(graph, name) for name in activation_quantizers(graph)]
        bits = [quantizer.bits for quantizer in activation_quantizers(graph).values()]
        found[network] = {edge.source.name: b for edge, b in zip(edges, bits, strict=True)}
    assert found["branches"] == {
        "images": 8,
        "stem_0": 8,
        "stem_2": 4,
        "cat": 8,
        "pool": 4,
        "last_0": 8,
        "add": 8,
    }
    assert found["tokens"] == {
        "norm": 4,
        "getitem": 4,
        "transpose_1": 4,
        "getitem_2": 4,
        "softmax": 4,
        "matmul_1": 4,
        "mlp_0": 4,
        "mlp_2": 4,
        "mean": 8,
    }


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("network", EVERY)
def test_without_integer_biases_every_value_stays(network, bits):
    student = result_of(network, bits).student
    lowered = lower(student, replace(ORT, integer_bias=False), Plain())
    assert_close(lowered(images()), student(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("protocol", ["simulate-all", "minmax-ptq", "ptq-8bit-ends", "tensorrt"])
def test_the_values_of_other_protocols_stay_too(protocol):
    """BatchNorm that was not folded goes into scales, asymmetric weights of few bits become symmetric codes."""
    student = result_of("resnet", "w7a4" if protocol != "ptq-8bit-ends" else "w4a4", protocol).student
    if protocol == "ptq-8bit-ends":
        with pytest.raises(UnsupportedModel, match=r"the 8-bit weights of 0 are asymmetric, and ort-x86 cannot hold"):
            lower(student, ORT, Plain())
        return
    lowered = lower(student, replace(ORT, integer_bias=False), Plain())
    assert_close(lowered(images()), student(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", EVERY)
def test_biases_are_integers_at_activation_scale_times_weight_scale(network):
    student = result_of(network, "w4a4").student
    lowered = lower(student, ORT, Plain())
    exact = lower(student, replace(ORT, integer_bias=False), Plain())
    count = 0
    for node in layers(lowered):
        layer, act = module_of(node), module_of(node.all_input_nodes[0])
        if not hasattr(layer, "parametrizations") or "bias" not in layer.parametrizations:
            continue
        bias = layer.parametrizations.bias[0]
        assert isinstance(bias, IntegerBias)
        assert bias.codes.dtype == torch.int32
        assert torch.equal(bias.scale, act.scale * integer_weight(layer).scale)  # to the bit
        assert_close(layer.bias, exact.get_submodule(str(node.target)).bias, rtol=0, atol=float(bias.scale.max()) / 2)
        count += 1
    floats = {"tokens": 5, "dense": 1}  # linears of tokens add theirs in float, and so does the transposed convolution
    assert count == len(layers(lowered)) - floats.get(network, 0)


def test_the_bias_of_a_dead_channel_is_kept():
    student = result_of("dead").student
    lowered = lower(student, ORT, Plain())
    assert_close(lowered.get_submodule("0").bias[1], student.get_submodule("0").bias[1], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    ("bits", "inputs", "factor"),
    [
        (8, 255, 1),
        (4, 255, 8),  # 2 * 255 * 8 * 8 = 32640 fits int16, the double does not
        (4, 15, 16),  # -8 * 16 is the least int8
        (2, 15, 64),
        (2, 255, 32),
    ],
)
def test_weights_of_few_bits_are_widened_as_far_as_int16_sums_and_int8_go(bits, inputs, factor):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    assert _widening(codes, IntegerActivation(torch.tensor(0.1), 0, 0, inputs, torch.uint8, Plain())) == factor


def test_clips_become_limits_of_integers():
    lowered = lower(result_of("mobilenet", "w8a8").student, ORT, Plain())
    assert not nodes(lowered, nn.ReLU6)
    grids = {module.limits[2]: module for module in nodes(lowered, IntegerActivation)}
    assert all(high == 255 or round(6 / grid.step) + grid.limits[0] == high for high, grid in grids.items())


def test_the_parts_of_a_concatenation_have_one_grid():
    lowered = lower(result_of("branches", "w8a8").student, ORT, Plain())
    cat = next(node for node in lowered.graph.nodes if node.target is torch.cat)
    steps = {module_of(part).step for part in cat.all_input_nodes}
    assert len(steps) == 1
    assert all(module_of(user).step in steps for user in cat.users)


def test_a_part_on_a_grid_of_its_own_is_clipped_to_the_grid_of_the_whole():
    lowered = lower(result_of("dense").student, ORT, Plain())
    whole = [module_of(user) for node in lowered.graph.nodes if node.target is torch.cat for user in node.users]
    assert [grid.limits[1:] for grid in whole] == [(0, 255), (0, 15)]  # no layer reads the first: 8 bits


@pytest.mark.parametrize(
    ("network", "floats"),
    [
        ("resnet", {}),
        ("mobilenet", {}),
        ("branches", {}),
        ("dense", {"up": "there is no integer kernel for transposed convolutions"}),
        ("tokens", {"patches": "it reads images in float"}),
    ],
)
def test_what_stays_float_and_why(network, floats):
    lowered = lower(result_of(network).student, ORT, Plain())
    reasons = {str(node.target): why_float(node, ORT) for node in layers(lowered)}
    assert {name: reason for name, reason in reasons.items() if reason} == floats


def test_tensorrt_is_symmetric_int8_with_float_biases():
    target = TARGETS["tensorrt"]
    lowered = lower(result_of("resnet", "w8a8", "tensorrt").student, target, Plain())
    assert {module.zero_point.dtype for module in nodes(lowered, IntegerActivation)} == {torch.int8}
    assert {int(module.zero_point) for module in nodes(lowered, IntegerActivation)} == {0}
    assert not nodes(lowered, IntegerBias)
    assert len(nodes(lowered, IntegerWeight)) == len(layers(lowered))
    with pytest.raises(UnsupportedModel, match="tensorrt holds int8 around 0: quantize with --protocol tensorrt"):
        lower(result_of("resnet", "w8a8").student, target, Plain())
    with pytest.raises(UnsupportedModel, match=r"cannot hold the 4-bit activations of .*: quantize with 8-bit"):
        lower(result_of("resnet", "w4a4", "tensorrt").student, target, Plain())


def test_a_module_that_could_not_be_traced_is_named():
    student = capture(tiny.gated(), torch.zeros(2, *tiny.SHAPE))
    with pytest.raises(UnsupportedModel, match=r"3 cannot be exported, because it could not be traced .* rewrite"):
        lower(student, ORT, Plain())


def test_the_student_is_left_alone():
    student = result_of("resnet", "w4a4").student
    before, code = student(images()), student.code
    lower(student, ORT, Plain())
    assert torch.equal(student(images()), before)
    assert student.code == code
