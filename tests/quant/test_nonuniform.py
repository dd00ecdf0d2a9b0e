import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor
from torch.nn import functional as F
from torch.testing import assert_close

from zsq.quant import (
    Log2,
    LogSqrt2,
    MinMax,
    PercentileSearch,
    PowerOfTwoFactors,
    Scheme,
    TwinGELU,
    TwinSoftmax,
)
from zsq.quant.nonuniform import grid_from, grid_words
from zsq.quant.quantizers import ActivationQuantizer

EVERY = [Log2(), LogSqrt2(), LogSqrt2(zero="beside"), TwinSoftmax(), TwinGELU(), PowerOfTwoFactors()]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def calibrated(grid, x, bits=4, span=None):
    quantizer = ActivationQuantizer(bits, grid).to(x.dtype)
    quantizer.observe(span or MinMax())
    quantizer(x)
    quantizer.observe(None)
    return quantizer


def natural(grid, *shape, seed=0):
    """Values of the kind that ``grid`` is for."""
    x = draw(*shape, seed=seed)
    if isinstance(grid, TwinGELU):
        return F.gelu(2 * x)
    return x if isinstance(grid, PowerOfTwoFactors) else (3 * x).softmax(-1)


@pytest.mark.parametrize("zero", ["last code", "beside"])
def test_log2_by_hand(zero):
    # -log2: 0, 0.415, 0.515, 1.47, 1.74, 3.32, 9.97, 16.6; the last rounds to 17, beyond the 15 of 4 bits
    x = tensor([1.0, 0.75, 0.7, 0.36, 0.3, 0.1, 1e-3, 1e-5])
    found = calibrated(Log2(zero=zero), x)(x)
    assert found.tolist() == [1, 1, 0.5, 0.5, 0.25, 0.125, 2**-10, 0]


@pytest.mark.parametrize("zero", ["last code", "beside"])
def test_log_sqrt2_by_hand(zero):
    # -2 log2: 0, 0.83, 2, 2.95, 3.47, 6.64 (7), 13.3 (13), 19.9 (20, beyond 15)
    x = tensor([1.0, 0.75, 0.5, 0.36, 0.3, 0.1, 0.01, 1e-3])
    found = calibrated(LogSqrt2(zero=zero), x)(x)
    assert_close(found, tensor([1.0, 0.7071, 0.5, 0.3536, 0.3536, 0.08839, 0.01105, 0.0]), atol=5e-5, rtol=0)


def test_the_inference_form_of_log_sqrt2_is_a_shift_and_a_parity():
    quantizer = calibrated(LogSqrt2(zero="beside"), tensor([0.8]))
    for q in range(16):
        x = 0.8 * 2.0 ** (-q / 2)
        y = 0.8 * 2.0 ** -math.ceil(q / 2) * ((q % 2) * (math.sqrt(2) - 1) + 1)
        assert quantizer(tensor([x])).item() == pytest.approx(y, rel=1e-6)


def test_at_3_bits_log_sqrt2_of_the_released_code_ends_at_0_074():
    quantizer = calibrated(LogSqrt2(zero="beside"), tensor([1.0]), bits=3)
    assert quantizer(tensor([0.0743, 0.0744])).tolist() == [0, pytest.approx(2**-3.5)]  # 2^-3.75 = 0.07433
    # where 0 takes the last of the 8 codes, that end is at 2^-3.25 = 0.1051
    assert calibrated(LogSqrt2(), tensor([1.0]), bits=3)(tensor([0.105, 0.1052])).tolist() == [0, 0.125]


def test_an_upper_quantile_can_be_the_largest_value():
    # 9,999 values up to 0.1 and one of 1: the grid that ends at 1 wastes 6 or 7 of its 16 codes
    x = torch.cat([torch.linspace(0.0005, 0.1, 9999), tensor([0.11])])
    quantizer = calibrated(LogSqrt2(), x, span=PercentileSearch())
    tried = {share: x.double().quantile(share).item() for share in (0.999, 0.9999, 0.99999)}
    errors = {}
    for d in tried.values():
        kept = ActivationQuantizer(4, LogSqrt2())
        kept.set_range(tensor(0.0), tensor(d))
        errors[d] = (kept(x) - x).square().mean().item()
    assert quantizer.scale.item() == pytest.approx(min(errors, key=errors.get), rel=1e-5)


def test_twin_softmax_by_hand_and_without_the_offset_of_the_released_code():
    # 6 bits: 32 codes each; c = 1/16: steps 1/496 below and 1/31 above; 0.5 is 15.5 steps, half to even 16
    quantizer = ActivationQuantizer(6, TwinSoftmax())
    quantizer.set_grid(quantizer.scheme.over(tensor([0.0]), tensor([1.0]), 6)._replace(scale=tensor([1 / 16 / 31])))
    found = quantizer(tensor([1.0, 0.5, 1e-6, 0.03]))
    assert_close(found, tensor([1.0, 16 / 31, 0.0, 15 / 496]))  # the released code makes 1.0625, 0.5786 and 0.0645


def test_the_split_search_takes_the_least_error():
    x = (4 * draw(8, 16, 16)).softmax(-1)
    quantizer = calibrated(TwinSoftmax(), x)
    errors = []
    for exponent in range(20):
        c = 2.0**-exponent
        fine, coarse = (x / (c / 7)).round().clamp(0, 7) * (c / 7), (x * 7).round() / 7
        errors.append((torch.where(x < c, fine, coarse) - x).square().mean().item())
    best = min(range(20), key=errors.__getitem__)
    assert 0 < best < 19
    assert quantizer.scale.item() == pytest.approx(2.0**-best / 7)


def test_twin_gelu_by_hand():
    # 4 bits: 8 codes each; below 0 the step is 0.16997 / 8 = 0.021246, above it 6 / 7.5 = 0.8 up to 7 steps
    quantizer = calibrated(TwinGELU(), tensor([-0.16997124, 6.0]))
    found = quantizer(tensor([-0.17, -0.03, 0.0, 0.39, 0.41, 6.0]))
    assert_close(found, tensor([-0.16997124, -0.021246405, 0.0, 0.0, 0.8, 5.6]))


def test_the_depth_of_gelu():
    x = torch.linspace(-1, 0, 100_001, dtype=torch.float64)
    depth, where = F.gelu(x).min(0)
    assert depth.item() == pytest.approx(-0.16997124, abs=5e-8)
    assert x[where].item() == pytest.approx(-0.7518, abs=1e-4)


def exponents(quantizer):
    return (quantizer.scale / quantizer.scale.max()).log2().add(3).round().int().tolist()


def test_power_of_two_factors_follow_the_deviations():
    x = draw(4096, 4) * tensor([1, 1 / 2, 1 / 4, 1 / 8])
    quantizer = calibrated(PowerOfTwoFactors(), x, bits=8)
    assert exponents(quantizer) == [3, 2, 1, 0]
    assert_close(quantizer.scale[0].detach(), (x.max() - x.min()) / 255)
    assert quantizer.zero_point.unique().numel() == 1


def test_channels_that_are_alike_have_one_exponent():
    x = draw(4096, 1).expand(-1, 6).contiguous()[:, torch.randperm(6)]
    assert len(set(exponents(calibrated(PowerOfTwoFactors(), x, bits=8)))) == 1
    assert len(set(exponents(calibrated(PowerOfTwoFactors(), draw(4096, 6), bits=8)))) == 1


@pytest.mark.parametrize(
    ("sigma", "uniform", "log2", "log_sqrt2"),
    [(0.1, 0.0008, 0.058, 0.010), (1, 0.170, 0.042, 0.011), (2, 0.073, 0.047, 0.012), (4, 0.010, 0.039, 0.010)],
)
def test_errors_of_attention_at_4_bits(sigma, uniform, log2, log_sqrt2):
    """Squared relative error of A V over 197 tokens, d the largest probability: the card's table, of another draw."""
    rng = torch.Generator().manual_seed(0)
    a = (sigma * torch.randn(12, 197, 197, generator=rng)).softmax(-1)
    v = torch.randn(12, 197, 64, generator=rng)
    for grid, expected in ((Scheme(), uniform), (Log2(zero="beside"), log2), (LogSqrt2(zero="beside"), log_sqrt2)):
        wrong = calibrated(grid, a)(a) @ v - a @ v
        found = (wrong.square().mean() / (a @ v).square().mean()).item()
        assert found == pytest.approx(expected, rel=0.35), (grid, found)


@pytest.mark.parametrize("grid", EVERY, ids=repr)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_are_kept_on_the_grid_and_are_two_to_the_bits(grid, bits):
    x = natural(grid, 64, 32)
    quantizer = calibrated(grid, x, bits)
    y = quantizer(x)
    split = quantizer.scale * (2 ** (bits - 1) - 1) if isinstance(grid, TwinSoftmax) else tensor(math.inf)
    kept = (y - split).abs() > 1e-6  # the split itself belongs to the coarse part, though values just below round to it
    assert_close(quantizer(y)[kept], y[kept], rtol=1e-5, atol=1e-7)
    most = 2**bits + (getattr(grid, "zero", "") == "beside")
    channels = y.T if isinstance(grid, PowerOfTwoFactors) else [y]
    assert all(channel.unique().numel() <= most for channel in channels)
    assert y.isfinite().all()


@given(st.integers(0, 2**31), st.sampled_from([3, 4, 6]))
def test_rounding_is_monotone(seed, bits):
    for grid in EVERY:
        x = natural(grid, 16, 16, seed=seed)
        quantizer = calibrated(grid, x, bits)
        lane = torch.linspace(float(x.min()), float(x.max()), 200)
        if isinstance(grid, PowerOfTwoFactors):
            lane = lane[:, None].expand(-1, 16)
        assert (quantizer(lane).diff(dim=0) >= -1e-6).all(), grid


@pytest.mark.parametrize("grid", EVERY, ids=repr)
def test_zero_and_nothing_are_zero(grid):
    x = torch.zeros(8, 8)
    y = calibrated(grid, x)(x)
    assert y.isfinite().all()
    assert y.abs().max() < 1e-6


@pytest.mark.parametrize("grid", EVERY, ids=repr)
def test_gradients_pass_inside_and_scales_learn_where_they_can(grid):
    x = natural(grid, 16, 16)
    quantizer = calibrated(grid, x)
    leaf = x.clone().requires_grad_()
    quantizer.scale.requires_grad_()
    y = quantizer(leaf)
    assert torch.equal(y.detach(), quantizer.rounded(x))
    y.backward(torch.ones_like(y))
    assert set(leaf.grad.unique().tolist()) <= {0.0, 1.0}
    assert leaf.grad.mean() > 0.5
    assert (quantizer.scale.grad is not None) == grid.learns


def test_the_gradient_of_the_scale_of_log_sqrt2_is_that_of_lsq():
    # y = d Q(x / d): the sum over values of (y - x) / d inside, and of y / d above
    x = tensor([0.3, 0.6, 1.5])
    quantizer = calibrated(LogSqrt2(), tensor([1.0]))
    quantizer.scale.requires_grad_()
    y = quantizer(x.requires_grad_())
    y.sum().backward()
    assert quantizer.scale.grad.item() == pytest.approx((0.35355 - 0.3) + (0.70711 - 0.6) + 1.0, abs=1e-4)


@pytest.mark.parametrize("grid", EVERY, ids=repr)
def test_a_kept_range_is_a_range(grid):
    x = natural(grid, 16, 16)
    first, second = calibrated(grid, x), ActivationQuantizer(4, grid)
    second.restore_range(first.range_state())
    assert torch.equal(second(x), first(x))


@pytest.mark.parametrize("grid", [*EVERY, Scheme(symmetric=True)], ids=repr)
def test_a_grid_comes_back_from_its_words(grid):
    assert grid_from(grid_words(grid)) == grid


def test_words_of_no_grid_are_refused():
    with pytest.raises(KeyError):
        grid_from({"kind": "Log3"})
    with pytest.raises(TypeError):
        grid_from({"kind": "Log2", "nose": 1})
