import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, tensor
from torch.testing import assert_close

from zsq.nets.graph import capture
from zsq.quant import (
    PTQ_8BIT_ENDS,
    AdaRound,
    Calibrate,
    InsertFakeQuant,
    LpError,
    MinMax,
    Nearest,
    PerChannel,
    RangeAverage,
    Scheme,
)
from zsq.quant.quantizers import (
    ActivationQuantizer,
    WeightQuantizer,
    activation_quantizers,
    float_mode,
    float_weight,
    freeze,
    mix,
    quantize_weight,
    random_mask,
    weight_quantizer,
    weight_quantizers,
)
from zsq.synthesis import Noise

PER_CHANNEL = Scheme(granularity=PerChannel())
SYMMETRIC = Scheme(symmetric=True)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def learned(weight, bits=4):
    return WeightQuantizer.fit(weight, bits, PER_CHANNEL, LpError(), AdaRound(), 0)


def calibrated(bits, scheme, *batches, span=None):
    quantizer = ActivationQuantizer(bits, scheme)
    quantizer.observe(span or MinMax())
    for batch in batches:
        quantizer(batch)
    quantizer.observe(None)
    return quantizer


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_soft_weights_start_as_the_float_weights_inside_the_grid(bits):
    weight = random(6, 5, 3, 3)
    quantizer = learned(weight, bits)
    steps = weight / quantizer.scale + quantizer.zero_point
    inside = (steps >= quantizer.low) & (steps <= quantizer.high)
    assert inside.float().mean() > 0.5
    assert (quantizer(weight) - weight)[inside].abs().max() < 1e-6


def test_the_gradient_of_the_scale_is_the_integers_exactly():
    weight = random(3, 4, 3, 3)
    quantizer = learned(weight, 3)
    quantizer.scale.requires_grad_()
    out = quantizer(weight)
    integers = quantizer.integers(weight).detach() - quantizer.zero_point
    for index in [(0, 0, 0, 0), (1, 2, 1, 0), (2, 3, 2, 2)]:
        (grad,) = torch.autograd.grad(out[index], quantizer.scale, retain_graph=True)
        assert grad[index[0]].item() == integers[index].item()
        assert grad.count_nonzero() <= 1
    assert_close(torch.autograd.grad(out.sum(), quantizer.scale)[0], integers.sum((1, 2, 3), keepdim=True))


def test_a_moved_scale_moves_neither_the_base_nor_the_zero_point():
    weight = random(3, 8)
    quantizer = learned(weight)
    integers, zero_point = quantizer.integers(weight).detach().clone(), quantizer.zero_point.clone()
    quantizer.scale.data *= 1.3
    assert torch.equal(quantizer.integers(weight), integers)
    assert torch.equal(quantizer.zero_point, zero_point)


@pytest.mark.parametrize("rounding", [Nearest(), AdaRound()])
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Linear(5, 3)], ids=repr)
def test_frozen_codes_give_the_hard_weights_to_the_bit(rounding, layer):
    layer = copy.deepcopy(layer)
    quantize_weight(layer, 3, PER_CHANNEL, MinMax(), rounding)
    quantizer = weight_quantizer(layer)
    if isinstance(rounding, AdaRound):
        quantizer.rounding.logits.data.add_(random(*layer.weight.shape))
        quantizer.rounding.hard = True
    before = layer.weight.detach().clone()
    freeze(layer)
    assert torch.equal(layer.weight, before)
    assert torch.equal(float_weight(layer), before)
    assert quantizer.codes.dtype == torch.uint8
    assert quantizer.codes.max() < 2**3
    assert all(len(row.unique()) <= 2**3 for row in before.flatten(1))
    freeze(layer)  # a second time changes nothing
    assert torch.equal(layer.weight, before)


def test_codes_count_from_the_lower_end_of_a_signed_grid():
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = tensor([[-1.5, 0.0, 1.5]])  # 2 bits, -2 .. 1, scale 1: -2 (half to even), 0, 1 (clamped)
    quantize_weight(layer, 2, Scheme(symmetric=True, granularity=PerChannel()), MinMax(), Nearest())
    freeze(layer)
    assert weight_quantizer(layer).codes.tolist() == [[0, 2, 3]]
    assert layer.weight.tolist() == [[-2.0, 0.0, 1.0]]


def test_a_transposed_convolution_has_one_scale_for_each_output_channel():
    layer = nn.ConvTranspose2d(3, 5, 2)
    layer.weight.data *= 10.0 ** torch.arange(5).view(1, 5, 1, 1)
    weight = layer.weight.detach().clone()
    quantize_weight(layer, 8, PER_CHANNEL, MinMax(), Nearest())
    assert weight_quantizer(layer).scale.shape == (1, 5, 1, 1)
    error = (layer.weight - weight).abs().amax((0, 2, 3)) / weight.abs().amax((0, 2, 3))
    assert error.max() < 1 / 255


def test_a_dead_channel_is_quantized_to_finite_zeros():
    for rounding in (Nearest(), AdaRound()):
        layer = nn.Conv2d(2, 3, 3)
        layer.weight.data[1] = 1e-14
        quantize_weight(layer, 4, PER_CHANNEL, LpError(), rounding)
        assert layer.weight.isfinite().all()
        assert layer.weight[1].abs().max() < 1e-12
        freeze(layer)
        assert layer.weight.isfinite().all()


def following(weight, bits=4):
    return WeightQuantizer.fit(weight, bits, PER_CHANNEL, MinMax(), Nearest(), 0, follow=True)


def test_a_grid_follows_a_weight_that_learns():
    weight = random(3, 10)
    quantizer = following(weight)
    moved = (2 * weight + 0.1).requires_grad_()
    quantizer(moved)
    fresh = following(moved.detach())
    assert torch.equal(quantizer.scale, fresh.scale)
    assert torch.equal(quantizer.zero_point, fresh.zero_point)
    with torch.no_grad():
        quantizer(10 * weight)  # a look at another weight is no step of training
    assert torch.equal(quantizer.scale, fresh.scale)


def test_a_grid_that_does_not_follow_stays():
    weight = random(3, 10)
    quantizer = WeightQuantizer.fit(weight, 4, PER_CHANNEL, MinMax(), Nearest(), 0)
    scale = quantizer.scale.clone()
    quantizer((2 * weight).requires_grad_())
    assert torch.equal(quantizer.scale, scale)
    assert torch.equal(quantizer.codes_at(2 * weight), quantizer.integers(2 * weight))


def test_codes_are_asked_for_without_a_trace():
    weight = random(3, 10)
    quantizer = following(weight)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    moved = weight * torch.tensor([1.0, 2.0, 3.0])[:, None] + 0.2
    codes = quantizer.codes_at(moved)
    assert torch.equal(codes, following(moved).integers(moved))
    assert not torch.equal(codes, quantizer.integers(moved))  # which are those of the old grid
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())


@given(st.integers(0, 2**31), st.integers(2, 8), st.floats(-2, 2))
def test_following_keeps_every_weight_within_half_a_step_and_zero_exact(seed, bits, shift):
    weight = (random(4, 9, seed=seed) + shift).requires_grad_()
    quantizer = following(random(4, 9), bits)
    error = (quantizer(weight) - weight).detach()
    assert (error.abs() <= quantizer.scale * (0.5 + 1e-3)).all()  # the extremes of each channel too
    assert ((quantizer.zero_point >= 0) & (quantizer.zero_point < 2**bits)).all()
    assert quantizer(torch.zeros(4, 9)).count_nonzero() == 0


def test_the_weight_gets_the_gradient_unchanged():
    weight = random(3, 10).requires_grad_()
    grad = random(3, 10, seed=1)
    for quantizer in (
        following(random(3, 10)),
        WeightQuantizer.fit(random(3, 10) / 9, 4, PER_CHANNEL, MinMax(), Nearest(), 0),
    ):
        weight.grad = None
        quantizer(weight).backward(grad)
        assert torch.equal(weight.grad, grad)  # the second grid clips most of the weight
        assert quantizer.scale.grad is None


def test_freezing_decides_on_the_grid_of_the_last_weight():
    layer = nn.Linear(10, 3)
    quantize_weight(layer, 4, PER_CHANNEL, MinMax(), Nearest(), follow=True)
    learned = float_weight(layer).data.mul_(3).clone()
    freeze(layer)
    assert_close(layer.weight, following(learned)(learned))
    assert weight_quantizer(layer).refit is None


# --- activations -----------------------------------------------------------------------------------------------------


def slow_lsq(x, scale, zero_point, low, high, grad, keep):
    """Output, d/dx and d/ds element by element in plain float64."""
    out, by_x, by_scale = [], [], 0.0
    for v, g, k in zip(x, grad, keep, strict=True):
        q = round(v / scale)
        inside = low - zero_point <= v / scale <= high - zero_point
        q = min(max(q, low - zero_point), high - zero_point)
        out.append(v if k else q * scale)
        by_x.append(g if k or inside else 0.0)
        if not k:
            by_scale += g * (q - v / scale if inside else q)
    return out, by_x, by_scale


@given(st.integers(0, 2**31), st.integers(2, 8), st.booleans(), st.booleans(), st.booleans())
def test_gradients_are_those_of_lsq(seed, bits, symmetric, signed, drop):
    x = 2 * random(40, seed=seed, dtype=torch.float64)
    quantizer = ActivationQuantizer(bits, Scheme(symmetric=symmetric)).double()
    quantizer.set_range(tensor(-1.3 if signed else 0.0).double(), tensor(1.7).double(), signed)
    quantizer.scale.requires_grad_()
    quantizer.drop, quantizer.rng = 0.5 * drop, torch.Generator().manual_seed(seed)
    keep = random_mask(x, 0.5, torch.Generator().manual_seed(seed)) if drop else torch.zeros(40)
    grad = random(40, seed=seed + 1, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    y.backward(grad)
    numbers = quantizer.scale.item(), quantizer.zero_point.item(), quantizer.low, quantizer.high
    out, by_x, by_scale = slow_lsq(x.tolist(), *numbers, grad.tolist(), keep.tolist())
    assert_close(y.detach(), tensor(out, dtype=torch.float64))
    assert_close(leaf.grad, tensor(by_x, dtype=torch.float64))
    assert quantizer.scale.grad.item() == pytest.approx(by_scale, rel=1e-9, abs=1e-9)


def test_with_and_without_gradients_the_values_are_the_same():
    x = random(3, 4, 5)
    quantizer = calibrated(4, Scheme(), x)
    quantizer.scale.requires_grad_()
    with torch.no_grad():
        quiet = quantizer(x)
    assert torch.equal(quantizer(x).detach(), quiet)


def test_a_value_passes_until_the_range_is_known():
    x = random(5)
    assert ActivationQuantizer(4, Scheme())(x) is x


def test_ranges_are_the_union_over_batches_and_end_there():
    quantizer = calibrated(8, Scheme(), tensor([0.0, 1.0]), tensor([-1.0, 0.5]), tensor([0.0, 3.0]))
    assert quantizer.scale.item() == pytest.approx(4 / 255)
    assert quantizer.zero_point.item() == round(255 / 4)
    quantizer(tensor([100.0]))
    assert quantizer.scale.item() == pytest.approx(4 / 255)


def test_a_second_calibration_starts_anew():
    quantizer = calibrated(8, Scheme(), tensor([0.0, 8.0]))
    quantizer.observe(MinMax())
    quantizer(tensor([0.0, 1.0]))
    assert quantizer.scale.item() == pytest.approx(1 / 255)


def test_the_first_batch_decides_whether_a_symmetric_grid_is_signed():
    unsigned = calibrated(4, SYMMETRIC, tensor([0.0, 3.0]), tensor([-9.0, 1.0]))
    assert (unsigned.low, unsigned.high) == (0, 15)
    assert unsigned.scale.item() == pytest.approx(3 / 15)
    signed = calibrated(4, SYMMETRIC, tensor([-1.0, 3.0]), tensor([0.0, 1.0]))
    assert (signed.low, signed.high) == (-8, 7)
    assert signed.scale.item() == pytest.approx(6 / 15)
    assert signed.zero_point.item() == 0


def averaged(*batches, **settings):
    quantizer = ActivationQuantizer(8, Scheme())
    quantizer.observe(MinMax(), RangeAverage(**settings))
    for batch in batches:
        quantizer(batch)
    return quantizer


def test_a_moving_average_of_ranges_by_hand():
    # maxima 1 and 3: 0.1 * 1 = 0.1, then 0.9 * 0.1 + 0.1 * 3 = 0.39, read as 0.39 / 0.19 = 2.0526; minima 0 and -1:
    # 0, then -0.1, read as -0.1 / 0.19 = -0.5263
    one, two = tensor([0.0, 1.0]), tensor([-1.0, 3.0])
    assert averaged(one).scale.item() == pytest.approx(1 / 255)
    quantizer = averaged(one, two)
    assert quantizer.scale.item() == pytest.approx((2.0526 + 0.5263) / 255, rel=1e-4)
    assert quantizer.zero_point.item() == round(255 * 0.5263 / 2.5789)
    # fed back: 1, then (0.9 * 1 + 0.1 * 3) / 0.19 = 6.3158
    assert averaged(one, 3 * one, correction="fed back").scale.item() == pytest.approx(6.3158 / 255, rel=1e-4)


@pytest.mark.parametrize("correction", ["on reading", "fed back"])
def test_an_average_goes_on_from_what_was_kept(correction):
    batches = [tensor([0.0, 1.0]), tensor([-1.0, 3.0]), tensor([-0.3, 0.7]), tensor([-2.0, 0.1])]
    whole = averaged(*batches, correction=correction)
    resumed = averaged(correction=correction)
    resumed.restore_range(averaged(*batches[:2], correction=correction).range_state())
    for batch in batches[2:]:
        resumed(batch)
    assert resumed.range_state() == whole.range_state()


def test_a_kept_range_is_a_range():
    x = random(50)
    first, second = calibrated(4, SYMMETRIC, x), ActivationQuantizer(4, SYMMETRIC)
    second.restore_range(first.range_state())
    assert second.ready
    assert torch.equal(second(x), first(x))
    assert ActivationQuantizer(4, SYMMETRIC).range_state()["ends"] == []


def test_a_gradient_reaches_all_values_or_those_inside():
    x = tensor([-3.0, -1.0, 0.2, 1.0, 5.0], requires_grad=True)
    quantizer = calibrated(4, Scheme(), tensor([-1.0, 1.5]))
    grad, values = tensor([1.0, 2.0, 3.0, 4.0, 5.0]), []
    for clips, expected in ((False, grad), (True, tensor([0.0, 2.0, 3.0, 4.0, 0.0]))):
        quantizer.clips_gradient = clips
        x.grad = None
        y = quantizer(x)
        y.backward(grad)
        assert torch.equal(x.grad, expected)
        assert quantizer.scale.grad is None
        values.append(y.detach())
    assert torch.equal(*values)
    with torch.no_grad():
        assert torch.equal(quantizer(x), values[0])


def test_a_scale_that_learns_clips_the_gradient_in_any_case():
    x = tensor([0.2, 5.0], requires_grad=True)
    quantizer = calibrated(4, Scheme(), tensor([-1.0, 1.5]))
    quantizer.clips_gradient = False
    quantizer.scale.requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1, 0]
    assert quantizer.scale.grad != 0


@pytest.mark.parametrize("share", [0.5, 0.25, 0.9])
def test_random_mask_has_its_share_and_depends_on_the_stream_alone(share):
    x = torch.zeros(7, 3, 1001)
    mask = random_mask(x, share, torch.Generator().manual_seed(0))
    assert mask.shape == x.shape
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(share, abs=0.02)  # 21021 draws, and shares are multiples of 1/256
    assert torch.equal(mask, random_mask(x, share, torch.Generator().manual_seed(0)))
    assert not torch.equal(mask, random_mask(x, share, torch.Generator().manual_seed(1)))


def test_random_mask_is_even_over_positions():
    rng = torch.Generator().manual_seed(0)
    counts = sum(random_mask(torch.zeros(37), 0.5, rng) for _ in range(1000))
    assert (counts - 500).abs().max() < 80  # five standard deviations of 15.8


def test_mix_takes_one_or_the_other():
    assert mix(tensor([1.0, 2.0]), tensor([5.0, 7.0]), tensor([1.0, 0.0])).tolist() == [1.0, 7.0]


def test_dropped_quantization_keeps_elements_float():
    x = random(2000)
    quantizer = calibrated(2, Scheme(), x)
    rounded = quantizer(x)
    quantizer.drop, quantizer.rng = 0.5, torch.Generator().manual_seed(0)
    mixed = quantizer(x)
    kept = (mixed - x).abs() < 1e-6
    assert 0.45 < kept.float().mean() < 0.55
    assert_close(mixed[~kept], rounded[~kept])


# --- networks --------------------------------------------------------------------------------------------------------


def test_float_mode_is_the_teacher_and_ends(resnet, images, job_of, apply):
    job = job_of(resnet, "w2a2")
    apply(job, InsertFakeQuant(protocol=PTQ_8BIT_ENDS), Calibrate(), synthesizer=Noise(samples=8))
    with torch.no_grad():
        low, exact = job.student(images), resnet(images)
        with float_mode(job.student):
            assert_close(job.student(images), exact, atol=1e-5, rtol=1e-5)
        assert torch.equal(job.student(images), low)
        assert (low - exact).abs().max() > 1e-2
    with pytest.raises(KeyError), float_mode(job.student):
        raise KeyError
    assert all(quantizer.enabled for quantizer in activation_quantizers(job.student).values())


def test_freezing_a_network_changes_no_output(mobilenet, images, job_of, apply):
    job = job_of(mobilenet, "w4a4")
    apply(job, InsertFakeQuant(), Calibrate(), synthesizer=Noise(samples=8))
    before = job.student(images)
    freeze(job.student)
    assert torch.equal(job.student(images), before)


def test_quantizing_leaves_the_teacher_alone(resnet, job_of, apply):
    before = copy.deepcopy(resnet.state_dict())
    job = job_of(resnet)
    apply(job, InsertFakeQuant())
    freeze(job.student)
    assert all(torch.equal(value, before[name]) for name, value in resnet.state_dict().items())
    assert not any("parametrizations" in name for name in resnet.state_dict())


def test_quantizers_are_found_by_dotted_name(resnet):
    student = capture(resnet, torch.zeros(1, 3, 8, 8))
    quantize_weight(student.get_submodule("head"), 4, PER_CHANNEL, MinMax(), Nearest())
    ((name, (layer, quantizer)),) = weight_quantizers(student).items()
    assert (name, layer, quantizer.bits) == ("head", student.head, 4)
    assert weight_quantizer(student.get_submodule("stem.0")) is None
