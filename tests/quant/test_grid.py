import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close

from zsq.core import RecipeError
from zsq.quant import LpError, MinMax, Percentile, PerChannel, PerTensor, RangeAverage, Scheme
from zsq.quant.grid import affine, fake_quantize

ASYMMETRIC, SYMMETRIC = Scheme(), Scheme(symmetric=True)


def values(least=1):
    return st.lists(st.floats(-1e4, 1e4, width=32), min_size=least, max_size=20).map(tensor)


def schemes():
    return st.sampled_from([(ASYMMETRIC, True), (SYMMETRIC, True), (SYMMETRIC, False)])


def grid_of(x, bits, scheme, signed):
    return affine(*MinMax().of(x[None], bits, scheme, signed), bits, scheme, signed)


def on(grid, x):
    return fake_quantize(x, grid.scale, grid.zero_point, grid.low, grid.high)


def test_fake_quantize_by_hand():
    # 2 bits over [0, 3]: scale 1, so 0.4 -> 0, 1.6 -> 2, 5.0 -> 3 (clipped), and -1 -> 0
    grid = affine(tensor([0.0]), tensor([3.0]), 2, ASYMMETRIC)
    assert (grid.scale.item(), grid.zero_point.item(), grid.low, grid.high) == (1, 0, 0, 3)
    assert_close(on(grid, tensor([0.4, 1.6, 5.0, -1.0])), tensor([0.0, 2.0, 3.0, 0.0]))


def test_asymmetric_4_bits_over_minus_1_to_1_by_hand():
    # scale 2/15 = 1/7.5; -1 -> -7.5 -> -8 (half to even) -> -1.0667; 0 -> 0; 1 -> 8, clamped to 7 -> 0.9333
    x = tensor([-1.0, 0.0, 1.0], dtype=torch.float64)  # in float32, -1 / scale is not quite the tie
    grid = affine(x[:1], x[2:], 4, ASYMMETRIC)
    assert 1 / grid.scale.item() == pytest.approx(7.5)
    assert_close(on(grid, x), tensor([-8 / 7.5, 0.0, 7 / 7.5], dtype=torch.float64))


@pytest.mark.parametrize(
    ("bits", "low", "high", "x", "codes", "found"),
    [
        # 1 / scale = 15 / 1.7 = 8.8235, zero point round(6.18) = 6: 0.33 -> 2.91 -> 3 -> 0.34; 2.0 is clipped
        (
            *(4, -0.7, 1.0, [-0.7, -0.33, 0, 0.33, 1.0, 2.0]),
            *([-8, -5, -2, 1, 7, 7], [-0.68, -0.34, 0, 0.34, 1.02, 1.02]),
        ),
        (4, -1.0, 2.0, [0.33], [-1], [0.4]),  # 1 / scale = 5, zero point 5: 1.65 -> 2
        # 1 / scale = 3.75, zero point round(3.75) = 4: -0.2 -> -0.75 -> -1; 3 -> 11.25 -> 11
        (4, -1.0, 3.0, [-1, -0.2, 0, 0.5, 3], [-8, -5, -4, -2, 7], [-4 / 3.75, -1 / 3.75, 0, 2 / 3.75, 11 / 3.75]),
        (4, 0.0, 1.0, [0, 0.1, 0.2, 1, 1.2], [-8, -6, -5, 7, 7], [0, 2 / 15, 0.2, 1, 1]),
        (2, 0.0, 3.0, [0, 1, 2, 3], [-2, -1, 0, 1], [0, 1, 2, 3]),
    ],
)
def test_the_examples_of_the_papers(bits, low, high, x, codes, found):
    # the papers count codes from -2^(b-1), here they count from 0
    x, found = (tensor(each, dtype=torch.float64) for each in (x, found))
    grid = affine(*tensor([[low], [high]], dtype=torch.float64), bits, ASYMMETRIC)
    assert_close(on(grid, x), found)
    assert (found / grid.scale + grid.zero_point - 2 ** (bits - 1)).round().int().tolist() == codes


@pytest.mark.parametrize(
    ("scheme", "signed", "limits"),
    [(ASYMMETRIC, True, (0, 15)), (SYMMETRIC, True, (-8, 7)), (SYMMETRIC, False, (0, 15))],
)
def test_limits_of_4_bits(scheme, signed, limits):
    assert scheme.limits(4, signed) == limits


@given(values(), values(), st.integers(2, 8), schemes())
def test_fake_quantize_is_idempotent_and_monotone(x, seen, bits, kind):
    grid = grid_of(seen, bits, *kind)
    once = on(grid, x.sort().values)
    assert_close(on(grid, once), once, rtol=1e-6, atol=0)
    assert (once.diff() >= 0).all()


@given(values(), st.integers(2, 8), schemes())
def test_the_error_inside_the_range_is_half_a_step_at_most(x, bits, kind):
    x = x.abs() if kind == (SYMMETRIC, False) else x
    grid = grid_of(x, bits, *kind)
    # both ends of an asymmetric range move by up to half a step when the zero point is rounded
    assert ((on(grid, x) - x).abs() <= grid.scale * (0.5 + 1e-3)).all()


@given(values(), st.integers(2, 8), schemes())
def test_grid_points_are_kept_and_zero_is_one_of_them(x, bits, kind):
    grid = grid_of(x, bits, *kind)
    points = (torch.arange(grid.low, grid.high + 1) - grid.zero_point) * grid.scale
    assert len(points) == 2**bits
    assert_close(on(grid, points), points, rtol=1e-6, atol=0)
    assert grid.low <= grid.zero_point.item() <= grid.high
    assert on(grid, tensor([0.0])).item() == 0


@given(st.lists(values(3), min_size=1, max_size=4), st.integers(2, 8), schemes())
def test_per_channel_is_per_tensor_of_each_channel(channels, bits, kind):
    width = min(map(len, channels))
    weight = torch.stack([channel[:width] for channel in channels])
    grid = affine(*MinMax().of(PerChannel().rows(weight, 0), bits, *kind), bits, *kind)
    scale, zero_point = (PerChannel().spread(part, weight, 0) for part in (grid.scale, grid.zero_point))
    together = fake_quantize(weight, scale, zero_point, grid.low, grid.high)
    alone = torch.stack([on(grid_of(channel, bits, *kind), channel) for channel in weight])
    assert torch.equal(together, alone)


@given(st.sampled_from([0.0, 1e-13, 1e-30, 1e-45, -1e-20]), st.integers(2, 8), schemes())
def test_dead_channels_have_finite_scales(value, bits, kind):
    grid = grid_of(tensor([value, 0.0]), bits, *kind)
    assert grid.scale.item() > 0
    assert math.isfinite(1 / grid.scale.item())
    assert on(grid, tensor([0.0, value])).isfinite().all()
    for span in (LpError(candidates=4), Percentile()):
        assert all(end.isfinite().all() for end in span.of(tensor([[value, 0.0]]), bits, *kind))


def test_granularity_by_shape():
    weight = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert PerTensor().rows(weight, 0).shape == (1, 24)
    assert PerTensor().spread(tensor([1.0]), weight, 0).shape == (1, 1, 1, 1)
    assert PerChannel().rows(weight, 1).shape == (3, 8)
    assert PerChannel().rows(weight, 1)[1].tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    assert PerChannel().spread(torch.ones(3), weight, 1).shape == (1, 3, 1, 1)


@pytest.mark.parametrize(
    ("x", "bits", "scheme", "signed", "share", "scale", "zero_point"),
    [
        ([-1, -0.5, 0, 0.5, 1], 2, ASYMMETRIC, True, 0.90, 0.6, 2),
        ([-0.6, -0.2, 0.1, 0.3, 1.0], 3, ASYMMETRIC, True, 1.00, 1.6 / 7, 3),
        ([0, 0.2, 0.4, 1, 2, 3], 2, SYMMETRIC, False, 1.00, 1.0, 0),
        ([-1, -0.3, 0.2, 0.9], 4, SYMMETRIC, True, 0.95, 1.9 / 15, 0),
    ],
)
def test_lp_error_on_worked_examples(x, bits, scheme, signed, share, scale, zero_point):
    rows = tensor([x], dtype=torch.float32)
    low, high = LpError(p=2.4).of(rows, bits, scheme, signed)
    assert high.item() == pytest.approx(share * rows.max().item() if scheme is ASYMMETRIC or not signed else share)
    grid = affine(low, high, bits, scheme, signed)
    assert grid.scale.item() == pytest.approx(scale)
    assert grid.zero_point.item() == zero_point


def test_lp_error_example_has_the_levels_of_its_card():
    rows = tensor([[-1, -0.5, 0, 0.5, 1]])
    grid = affine(*LpError().of(rows, 2, ASYMMETRIC, True), 2, ASYMMETRIC)
    assert_close(on(grid, rows), tensor([[-1.2, -0.6, 0.0, 0.6, 0.6]]))


def slow_lp_error(x, bits, p, candidates):
    """Asymmetric: over the shares 1, 1 - 1/n, ..., the errors in plain float64."""
    low, high = min(0.0, *x), max(0.0, *x)
    errors = []
    for step in range(candidates):
        share = 1 - step / candidates
        scale = (high - low) * share / (2**bits - 1)
        zero_point = round(-low * share / scale)
        q = [min(max(round(v / scale) + zero_point, 0), 2**bits - 1) for v in x]
        errors.append(sum(abs(v - scale * (k - zero_point)) ** p for v, k in zip(x, q, strict=True)) / len(x))
    return errors


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 6), st.sampled_from([2.0, 2.4, 3.0]))
def test_lp_error_against_a_slow_transcription(seed, bits, p):
    x = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = LpError(p=p, candidates=20).of(x, bits, ASYMMETRIC, True)
    for row, least, most in zip(x, low, high, strict=True):
        errors = slow_lp_error(row.tolist(), bits, p, 20)
        share = 1 - errors.index(min(errors)) / 20
        assert most.item() == pytest.approx(share * row.max().item(), rel=1e-9)
        assert least.item() == pytest.approx(share * row.min().item(), rel=1e-9)


@given(st.integers(2, 300), st.floats(0.51, 1.0), st.integers(0, 2**31))
def test_percentile_against_a_slow_transcription(count, share, seed):
    x = torch.randn(1, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = Percentile(share=share).of(x, 8, ASYMMETRIC, True)
    ordered = sorted(x[0].tolist())
    cut = math.floor((1 - share) / 2 * count)
    assert low.item() == min(ordered[cut], 0)
    assert high.item() == max(ordered[count - 1 - cut], 0)


def test_percentile_ignores_an_outlier_that_min_max_sees():
    x = torch.linspace(0, 1, 1000)
    x[500] = 100
    assert Percentile(share=0.99).of(x[None], 8, ASYMMETRIC, True)[1].item() == pytest.approx(0.995, abs=2e-3)
    assert MinMax().of(x[None], 8, ASYMMETRIC, True)[1].item() == 100


def trace(average, ends):
    """What ``average`` reads after each of ``ends``, numbers, as both ends of a range."""
    kept, read = None, []
    for count, end in enumerate(ends, 1):
        now = tensor(end, dtype=torch.float64)
        kept = average.update(kept, (-now, now), count)
        low, high = average.read(kept, count)
        assert low == -high
        read.append(high.item())
    return read


def test_a_constant_fed_back_explodes_and_comes_home():
    # (0.9 * r + 0.1) / (1 - 0.9^t): 0.1 / 0.1 = 1; 1 / 0.19 = 5.263; (4.737 + 0.1) / 0.271 = 17.848;
    # (16.063 + 0.1) / 0.3439 = 47.000; (42.300 + 0.1) / 0.40951 = 103.54
    read = trace(RangeAverage(correction="fed back"), [1.0] * 400)
    assert read[:5] == pytest.approx([1, 5.263, 17.848, 47.000, 103.54], rel=1e-4)
    assert max(read) == read[20] == pytest.approx(3945, rel=1e-4)
    known = {50: 488.9, 80: 22.63, 100: 3.6346, 150: 1.01359, 200: 1.00007, 400: 1.0}
    assert {count: read[count - 1] for count in known} == pytest.approx(known, rel=1e-4)


@given(st.floats(0, 0.99), st.integers(1, 50))
def test_a_constant_is_its_own_average(decay, count):
    assert trace(RangeAverage(decay=decay), [1.0] * count) == pytest.approx([1] * count)


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=30),
    st.floats(0, 0.99),
    st.sampled_from(["on reading", "fed back"]),
)
def test_averages_against_a_slow_transcription(ends, decay, correction):
    kept, expected = 0.0, []
    for count, end in enumerate(ends, 1):
        kept = decay * kept + (1 - decay) * end
        expected.append(kept / (1 - decay**count))
        if correction == "fed back":
            kept = expected[-1]
    assert trace(RangeAverage(decay=decay, correction=correction), ends) == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.floats(0, 0.99))
def test_a_correct_average_lies_between_what_was_seen(ends, decay):
    read = trace(RangeAverage(decay=decay), ends)
    assert all(min(ends) * (1 - 1e-9) <= value <= max(ends) * (1 + 1e-9) for value in read)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_averages_refuse_what_makes_no_sense(decay):
    with pytest.raises(RecipeError):
        RangeAverage(decay=decay)


@pytest.mark.parametrize("make", [lambda: Percentile(share=0.5), lambda: LpError(p=0.0), lambda: LpError(candidates=0)])
def test_ranges_refuse_what_makes_no_sense(make):
    with pytest.raises(RecipeError):
        make()


def test_a_signed_grid_is_signed_also_where_the_data_is_not():
    rows = torch.tensor([[0.0, 1.0, 2.0]])
    always = Scheme(symmetric=True, signed=True)
    low, high = MinMax().of(rows, 8, always, signed=False)
    assert (low.item(), high.item()) == (-2.0, 2.0)
    grid = affine(low, high, 8, always, signed=False)
    assert (grid.low, grid.high, grid.zero_point.item()) == (-128, 127, 0)
    assert Scheme(signed=True).limits(8, signed=False) == (0, 255)  # asymmetric: nothing to say
