import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, tensor
from torch.testing import assert_close

from zsq.core import RecipeError
from zsq.quant import SIMULATE_ALL, BNRanges, Calibrate, EqualizeLayers, InsertFakeQuant
from zsq.quant.layers import fold
from zsq.quant.moments import clipped_normal, spreads, through_layer
from zsq.quant.quantizers import activation_quantizers
from zsq.synthesis import Noise

INFINITY = math.inf


def clipped(mean, std, low=0.0, high=INFINITY):
    mean, std = (tensor([value], dtype=torch.float64) for value in (mean, std))
    moments = clipped_normal(mean, std.square(), low, high)
    return tuple(moment.item() for moment in moments)


@pytest.mark.parametrize(
    ("mean", "std", "expected"), [(0.0, 1.0, (0.39894, 0.34085)), (1.0, 1.0, (1.08332, 0.7511)), (-50.0, 1.0, (0, 0))]
)
def test_relu_by_hand(mean, std, expected):
    assert clipped(mean, std) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("std", [0.01, 0.5, 1.0, 3.0, 30.0])
def test_relu6_in_its_middle_keeps_the_mean(std):
    assert clipped(3.0, std, 0, 6)[0] == pytest.approx(3, abs=1e-9)
    assert clipped(3.0, std, 0, 6)[1] <= min(std**2, 9) + 1e-9


def by_integration(mean, std, low, high, count=20_000):
    """Midpoint rule over 12 standard deviations, in plain float64."""
    step = 24 * std / count
    first = second = 0.0
    for index in range(count):
        x = mean - 12 * std + (index + 0.5) * step
        density = math.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi)) * step
        value = min(max(x, low), high)
        first, second = first + density * value, second + density * value * value
    return first, second - first * first


@pytest.mark.parametrize(
    ("mean", "std", "low", "high"),
    [(0.3, 0.7, 0, INFINITY), (-1.0, 2.0, 0, INFINITY), (2.0, 3.0, 0, 6), (5.5, 1.0, 0, 6), (-0.4, 0.8, -1, 1)],
)
def test_clipped_normal_against_an_integral(mean, std, low, high):
    assert clipped(mean, std, low, high) == pytest.approx(by_integration(mean, std, low, high), abs=1e-5)


@pytest.mark.parametrize(("low", "high"), [(0.0, INFINITY), (0.0, 6.0)])
def test_clipped_normal_against_a_simulation(low, high):
    mean, std = tensor([-1.0, 0.5, 4.0]), tensor([2.0, 1.0, 3.0])
    draws = (mean + std * torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0))).clamp(low, high)
    first, second = clipped_normal(mean, std.square(), low, high)
    assert ((draws.mean(0) - first).abs() <= 4 * draws.std(0) / math.sqrt(len(draws))).all()
    assert_close(draws.var(0), second, rtol=0.03, atol=0)


@given(st.floats(-5, 5), st.floats(1e-3, 5), st.floats(0.1, 10))
def test_clipping_narrows(mean, std, high):
    first, second = clipped(mean, std, 0, high)
    assert 0 <= first <= high
    assert 0 <= second <= std**2 + 1e-9


@given(st.floats(-10, 10))
def test_a_constant_is_clipped_as_it_is(value):
    assert clipped(value, 0.0, 0, 6) == pytest.approx((min(max(value, 0), 6), 0), abs=1e-9)


def test_no_clipping_changes_nothing():
    assert clipped(0.7, 1.3, -INFINITY, INFINITY) == pytest.approx((0.7, 1.69))


def test_each_channel_may_have_a_limit_of_its_own():
    mean, var = torch.full((2,), 3.0), torch.ones(2)
    first, _ = clipped_normal(mean, var, 0.0, tensor([6.0, 3.0]))
    assert first[0].item() == pytest.approx(3, abs=1e-6)
    assert first[1].item() == pytest.approx(3 - 0.39894, abs=2e-3)  # half a normal is cut away


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Linear(4, 3),
        nn.ConvTranspose2d(4, 6, 2, stride=2),
        nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
    ],
    ids=str,
)
def test_through_layer_is_the_layer_on_a_constant(layer):
    x = torch.randn(4, generator=torch.Generator().manual_seed(0))
    size = 3 if isinstance(layer, nn.Conv2d) else 1
    image = x if isinstance(layer, nn.Linear) else x.view(1, 4, 1, 1).expand(1, 4, size, size)
    out = layer(image).detach()
    if isinstance(layer, nn.Linear):
        expected = out - layer.bias
    elif isinstance(layer, nn.ConvTranspose2d):
        expected = (out - layer.bias.view(1, -1, 1, 1)).mean((0, 2, 3))  # each position sees a part of the kernel
    else:
        expected = (out - layer.bias.view(1, -1, 1, 1)).flatten()
    assert_close(through_layer(layer, x), expected, atol=1e-5, rtol=1e-5)


def test_through_layer_repeats_moments_over_a_flattened_map():
    layer = nn.Linear(6, 2, bias=False)
    layer.weight.data = torch.arange(12.0).view(2, 6)
    # two channels of three positions: (0 + 1 + 2) * 1 + (3 + 4 + 5) * 10
    assert through_layer(layer, tensor([1.0, 10.0])).tolist() == [123.0, 321.0]


def known(graph, name, sigmas=6.0):
    return next(spread for node, spread in spreads(graph, (-2.0, 3.0), sigmas).items() if node.name == name)


def test_spreads_of_a_residual_network(resnet, job_of):
    graph = job_of(resnet).student
    fold(graph)
    moments = graph.meta["moments"]
    stem = moments["stem.0"]
    assert known(graph, "images").low.tolist() == [-2.0] * 3
    assert known(graph, "images").high.tolist() == [3.0] * 3
    assert_close(known(graph, "stem_0").high, stem.mean + 6 * stem.std)
    mean, var = clipped_normal(stem.mean, stem.std.square(), 0.0, INFINITY)
    after = known(graph, "stem_2")
    assert_close((after.mean, after.var), (mean, var))
    assert_close(after.low, (stem.mean - 6 * stem.std).clamp(min=0))
    branch, total = moments["stages.0.0.conv2.0"], known(graph, "add")
    assert_close(total.mean, branch.mean + mean)  # the shortcut is an identity
    assert_close(total.var, branch.std.square() + var)
    assert_close(total.low, total.mean - 6 * total.var.sqrt())
    assert_close(known(graph, "pool").mean, known(graph, "stages_1_0_relu2").mean)
    logits = known(graph, "head")
    assert_close(logits.mean, resnet.head(known(graph, "flatten").mean), atol=1e-5, rtol=1e-5)


def test_spreads_of_a_concatenation(job_of):
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
            self.b = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
            self.b[1].bias.data += 5

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x).relu()], 1).flatten(1)

    graph = job_of(Fork().eval()).student
    fold(graph)
    both = known(graph, "cat")
    assert_close(both.low, tensor([-6.0, -6.0, 0.0, 0.0]))
    assert_close(both.high, tensor([6.0, 6.0, 11.0, 11.0]))
    assert_close(both.mean[2:], torch.full((2,), 5.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("relu6", [nn.ReLU6(), nn.Hardtanh(0, 6)], ids=str)
def test_ranges_end_at_six_standard_deviations_or_at_the_clip(relu6, job_of, apply):
    network = nn.Sequential(
        nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), relu6, nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()
    ).eval()
    network[1].weight.data, network[1].bias.data = tensor([0.5, -0.1]), tensor([0.0, 0.3])
    network[4].weight.data, network[4].bias.data = tensor([-2.0, 0.1]), tensor([1.0, 0.3])
    network = nn.Sequential(network, nn.Linear(128, 5)).eval()
    job = job_of(network, "w8a8")
    job.pixel_box = ((-2.0, 3.0),)
    apply(job, InsertFakeQuant(protocol=SIMULATE_ALL), BNRanges(sigmas=6.0))
    steps = [round(q.scale.item() * 255, 4) for q in activation_quantizers(job.student).values()]
    # images -2 .. 3; ReLU6 0 .. max(0 + 3, 0.3 + 0.6); ReLU 0 .. max(1 + 12, 0.3 + 0.6)
    assert steps == [5.0, 3.0, 13.0]
    apply(job, BNRanges(sigmas=20.0))
    steps = [round(q.scale.item() * 255, 4) for q in activation_quantizers(job.student).values()]
    assert steps == [5.0, 6.0, 41.0]  # clipped at 6


def test_ranges_hold_what_comes(mobilenet, images, job_of, apply):
    job = job_of(mobilenet, "w8a8")
    apply(job, EqualizeLayers(), InsertFakeQuant(protocol=SIMULATE_ALL), BNRanges())
    quantizers = activation_quantizers(job.student)
    assert all(quantizer.ready for quantizer in quantizers.values())
    wide = {name: quantizer.scale.item() for name, quantizer in quantizers.items()}
    assert all(0 < scale < 1 for scale in wide.values())
    apply(job, Calibrate(samples=8), synthesizer=Noise(samples=8))
    assert all(
        wide[name] > 0.3 * quantizer.scale.item() for name, quantizer in quantizers.items() if "images" not in name
    )


def test_no_negative_number_of_deviations():
    with pytest.raises(RecipeError):
        BNRanges(sigmas=0.0)
