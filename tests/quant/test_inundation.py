"""Gradient inundation against its worked examples, and against the rule written out slowly."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.testing import assert_close

from zsq.core import RecipeError
from zsq.quant import QAT_LOWBIT_ALL, InsertFakeQuant, MinMax, Nearest, PerChannel, Scheme
from zsq.quant.inundation import Inundation, inundated
from zsq.quant.quantizers import WeightQuantizer, float_weight, quantize_weight, weight_quantizer

SCHEME = Scheme(granularity=PerChannel())
UNCAPPED = 0


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def codes_of(weight, bits=4):
    return WeightQuantizer.fit(weight, bits, SCHEME, MinMax(), Nearest(), 0, follow=True).codes_at


def changed(codes, before, after):
    return (codes(after) != codes(before)).double().mean().item()


def quantized(layer, bits=4):
    """``layer`` in float64 with a grid that follows its weight, and that weight."""
    layer = layer.double()
    quantize_weight(layer, bits, SCHEME, MinMax(), Nearest(), follow=True)
    return layer, float_weight(layer).requires_grad_()


# --- the factor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr", "share", "factor", "fraction"),
    [
        (1e-4, 1e-3, 1.0, 2 / 1001),  # enough change already
        (1e-4, 1e-2, 13.25, 7 / 1001),  # the last midpoint tried lies below the share, and is kept
        (1e-4, 1e-1, 136.0, 101 / 1001),
        (1e-1, 1e-2, 1.0, 720 / 1001),  # never less than 1, though 72 % change
    ],
)
def test_a_line_of_weights_pushed_all_one_way(lr, share, factor, fraction):
    weight = torch.linspace(-1, 1, 1001, dtype=torch.float64)[None]
    push = torch.ones_like(weight)
    push[0, 0] = push[0, -1] = 0  # so that the grid stays
    codes = codes_of(weight)
    found = inundated(weight, -lr * push, codes, share, 5)
    assert found == factor
    assert changed(codes, weight, weight - found * lr * push) == pytest.approx(fraction)


def test_an_update_that_can_change_nothing_keeps_1():
    weight = random(3, 20)
    looks = []

    def codes(x):
        looks.append(x)
        return codes_of(weight)(x)

    assert inundated(weight, torch.zeros_like(weight), codes, 1e-3, 5) == 1
    assert len(looks) < 40


def test_a_tenth_of_the_update_gets_ten_times_the_factor():
    weight, direction = random(8, 50), random(8, 50, seed=1)
    codes = codes_of(weight)
    factors, fractions = [], []
    for lr in (1e-5, 1e-6, 1e-7):
        factors.append(inundated(weight, -lr * direction, codes, 0.02, 5))
        fractions.append(changed(codes, weight, weight - factors[-1] * lr * direction))
    for small, large in pairwise(factors):
        assert large / small == pytest.approx(10, rel=0.15)
    assert fractions == pytest.approx([0.02] * 3, abs=3 / 400)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5])
def test_the_factor_is_never_below_1_and_reaches_about_its_share(share):
    weight, direction = random(4, 100), random(4, 100, seed=2)
    codes = codes_of(weight)
    factor = inundated(weight, 1e-4 * direction, codes, share, 5)
    assert factor >= 1
    assert changed(codes, weight, weight + factor * 1e-4 * direction) >= 0.5 * share


def test_doubling_stops_behind_its_cap():
    weight = random(4, 100)
    factor = inundated(weight, 1e-9 * random(4, 100, seed=3), codes_of(weight), 0.1, 5, cap=100.0)
    assert 64 < factor <= 128


# --- the optimizer ---------------------------------------------------------------------------------------------------


def slow_codes(weight, bits):
    """Signed codes of a weight (O, n): s * w - round(s * min) - 2^(bits - 1), rounded and clamped."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    s = (2**bits - 1) / (high - low)
    half = 2 ** (bits - 1)
    return torch.clamp(torch.round(s * weight) - torch.round(s * low) - half, -half, half - 1)


def slow_factor(weight, update, bits, share, probes, cap):
    """Doubling, then bisection."""

    def fraction(a):
        return (slow_codes(weight + a * update, bits) != slow_codes(weight, bits)).double().mean().item()

    a = 1.0
    if fraction(a) >= share:
        return a
    while fraction(a) < share and a <= cap:
        a *= 2
    low, high = a / 2, a
    for _ in range(probes):
        a = (low + high) / 2
        if abs(fraction(a) - share) < share / 100:
            break
        if fraction(a) < share:
            low = a
        else:
            high = a
    return a


def test_steps_against_a_slow_transcription():
    layer, weight = quantized(nn.Linear(40, 6), bits=3)
    optimizer = Inundation(share=0.03, capped_steps=2).build(layer, 1e-4)
    w, b = weight.detach().clone(), layer.bias.detach().clone()
    w_buffer, b_buffer, factors = torch.zeros_like(w), torch.zeros_like(b), []
    for step in range(6):
        g, h = random(6, 40, seed=10 + step), random(6, seed=20 + step)
        weight.grad, layer.bias.grad = g.clone(), h.clone()
        optimizer.step()
        w_buffer, b_buffer = 0.9 * w_buffer + g, 0.9 * b_buffer + h  # momentum sees the plain gradient
        update = -1e-4 * (g + 0.9 * w_buffer)
        factors.append(slow_factor(w, update, 3, 0.03, 5, 100.0 if step < 2 else 2.0**30))
        w, b = w + factors[-1] * update, b - 1e-4 * (h + 0.9 * b_buffer)
        assert_close(weight.detach(), w, rtol=1e-9, atol=1e-12)
        assert_close(layer.bias.detach(), b, rtol=1e-12, atol=1e-12)
    assert max(factors) > 1


def test_without_a_share_it_is_nesterov_to_the_bit(resnet, job_of, apply, images):
    finals = []
    for make in (
        lambda s: Inundation(share=0.0).build(s, 1e-2),
        lambda s: SGD(s.parameters(), 1e-2, 0.9, nesterov=True),
    ):
        job = job_of(resnet)
        apply(job, InsertFakeQuant(protocol=QAT_LOWBIT_ALL, follow=True))
        for name, parameter in job.student.named_parameters():
            parameter.requires_grad_(not name.endswith("scale"))
        optimizer = make(job.student)
        for _ in range(10):
            optimizer.zero_grad()
            job.student(images).square().mean().backward()
            optimizer.step()
        finals.append(job.student.state_dict())
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())
    assert any(
        not torch.equal(value, resnet.state_dict()[name]) for name, value in finals[0].items() if name.endswith("bias")
    )


def test_a_weight_without_gradient_does_not_move():
    layer, weight = quantized(nn.Linear(20, 4))
    before = weight.detach().clone()
    for gradient in (torch.zeros_like(before), random(4, 20) * (torch.arange(20) > 3)):
        weight.grad = gradient.clone()
        Inundation(share=0.1).build(layer, 1e-6).step()
        still = gradient == 0
        assert torch.equal(weight.detach()[still], before[still])
    assert not torch.equal(weight.detach(), before)


def fractions_of(optimizer, weight, codes, steps, seed=30):
    """The share of codes that each step changes; weights shrink and the ends of rows stay, so their grids stay too."""
    found = []
    ends = torch.stack([weight.argmin(1), weight.argmax(1)], 1)
    for step in range(steps):
        before = weight.detach().clone()
        weight.grad = (random(*weight.shape, seed=seed + step).abs() * before.sign()).scatter_(1, ends, 0.0)
        optimizer.step()
        found.append(changed(codes, before, weight.detach()))
    return found


def test_the_share_falls_with_the_learning_rate():
    layer, weight = quantized(nn.Linear(100, 40))
    optimizer = Inundation(share=0.04, capped_steps=UNCAPPED).build(layer, 1e-6)
    codes = weight_quantizer(layer).codes_at
    early = fractions_of(optimizer, weight, codes, 3)
    optimizer.param_groups[0]["lr"] *= 0.1  # what a schedule does
    late = fractions_of(optimizer, weight, codes, 3)
    assert early == pytest.approx([0.04] * 3, rel=0.1)
    assert late == pytest.approx([0.004] * 3, rel=0.3)  # of 4000 codes


def test_the_factor_is_capped_in_the_first_steps_also_behind_a_checkpoint():
    layer, weight = quantized(nn.Linear(50, 4))
    recipe = Inundation(share=0.1, capped_steps=3, momentum=0.0)
    optimizer, factors = recipe.build(layer, 1e-9), []
    for step in range(5):
        if step == 2:
            kept = optimizer.state_dict()
            optimizer = recipe.build(layer, 1e-9)
            optimizer.load_state_dict(kept)
        before, weight.grad = (
            weight.detach().clone(),
            torch.full_like(weight, -1.0).index_fill_(1, torch.arange(3), 1.0),
        )
        optimizer.step()
        factors.append(((weight.detach() - before).abs().mean() / 1e-9).item())
    assert all(factor < 130 for factor in factors[:3])
    assert all(factor > 1000 for factor in factors[3:])


def test_only_weights_that_learn_are_inundated():
    first, second = quantized(nn.Linear(30, 4))[0], quantized(nn.Linear(4, 4))[0]
    network = nn.Sequential(first, second)
    frozen = float_weight(second).requires_grad_(False).clone()
    optimizer = Inundation(share=0.1).build(network, 1e-6)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(float_weight(second), frozen)


@pytest.mark.parametrize("wrong", [{"share": -0.1}, {"share": 1.0}, {"share": float("nan")}, {"probes": 0}], ids=str)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(RecipeError):
        Inundation(**wrong)


def test_a_step_below_the_rounding_of_float32_keeps_its_direction():
    rng = torch.Generator().manual_seed(0)
    layer = nn.Linear(100, 50, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(50, 100, generator=rng) * 0.05)
    quantize_weight(layer, 4, SCHEME, MinMax(), Nearest(), follow=True)
    weight = float_weight(layer).requires_grad_()
    old = weight.detach().clone()
    weight.grad = torch.randn(50, 100, generator=rng) * 1e-3
    Inundation(share=1e-2, capped_steps=0).build(layer, lr=1e-7).step()
    assert torch.cosine_similarity((weight.detach() - old).flatten(), -weight.grad.flatten(), dim=0) > 0.99
