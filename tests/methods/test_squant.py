import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, tensor
from torch.testing import assert_close

from zsq.core import RecipeError
from zsq.methods import METHODS
from zsq.methods.squant import PositiveSigma, SQuantRounding, flip
from zsq.quant import MinMax, Nearest, PerChannel, Scheme
from zsq.quant.grid import affine
from zsq.quant.quantizers import quantize_weight

FAR = tensor(-1e6), tensor(1e6)
PER_CHANNEL = Scheme(granularity=PerChannel())
E, K, C, BOTH = (SQuantRounding(kernels=k, channels=c) for c in (False, True) for k in (False, True))


def random(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(rounding, x, low=FAR[0], high=FAR[1]):
    return rounding.build(x, low, high)(x)


def kernel_sums(rounding, x):
    return (integers(rounding, x) - x).flatten(2).sum(2)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_one_kernel_by_hand():
    # all 0.4: nearest gives 0 (sum of errors -1.6), two go up (+0.4)
    x = torch.full((1, 1, 2, 2), 0.4)
    assert integers(E, x).sum() == 0
    assert integers(K, x).sum() == 2
    assert kernel_sums(K, x).item() == pytest.approx(0.4)


def test_an_overshooting_kernel_offers_its_last_flip_to_be_undone():
    error, spare = flip(torch.full((1, 1, 4), -0.4), torch.ones(1, 1, 4, dtype=torch.bool))
    assert_close(error, tensor([[[0.6, 0.6, -0.4, -0.4]]]))
    assert spare.tolist() == [[[False, True, False, False]]]  # error 0.6 > 0: a flip down


def test_an_undershooting_kernel_offers_the_next_in_line():
    # sum -1.3: one goes up, the next would be the second largest
    error, spare = flip(tensor([[[-0.3, -0.45, -0.2, -0.35]]]), torch.ones(1, 1, 4, dtype=torch.bool))
    assert_close(error, tensor([[[-0.3, 0.55, -0.2, -0.35]]]))
    assert spare.tolist() == [[[False, False, False, True]]]


@pytest.mark.parametrize(
    ("error", "spare"),
    [
        ([0.25, -0.25], [False, False]),  # the sum is 0: nothing was flipped, nothing to undo, nothing to add
        ([0.25, -0.125], [True, False]),  # no flip, but one is next in line
    ],
)
def test_kernels_in_which_nothing_is_flipped(error, spare):
    after, offered = flip(tensor([[error]]), torch.ones(1, 1, 2, dtype=torch.bool))
    assert after.tolist() == [[error]]
    assert offered.tolist() == [[spare]]


def test_two_kernels_by_hand():
    x = torch.full((1, 2, 2, 2), 0.4)
    assert kernel_sums(K, x)[0].tolist() == pytest.approx([0.4, 0.4])  # the channel has 0.8
    assert sorted(kernel_sums(BOTH, x)[0].tolist()) == pytest.approx([-0.6, 0.4])  # one flip undone: -0.2
    assert kernel_sums(C, x)[0].tolist() == pytest.approx([1.4, -1.6])  # three flips, wherever they fall


def test_3x3_kernel_by_hand():
    x = tensor([[0.3, -0.2, 0.45], [0.1, 0.49, -0.4], [0.2, 0.35, 0.05]]).view(1, 1, 3, 3)  # sum 1.34
    for rounding in (K, BOTH):
        expected = torch.zeros(1, 1, 3, 3)
        expected[0, 0, 1, 1] = 1  # only the 0.49 goes up
        assert torch.equal(integers(rounding, x), expected)
        assert kernel_sums(rounding, x).item() == pytest.approx(-0.34)


# --- independently ---------------------------------------------------------------------------------------------------


def slow_flip(errors, candidates):
    """The rule on one group: errors by index, candidates by index; returns the one candidate that is left."""
    total = sum(errors.values())
    count = round(abs(total))
    down = total > 0
    row = sorted((i for i in candidates if errors[i] != 0 and (errors[i] > 0) == down), key=lambda i: -abs(errors[i]))
    for i in row[:count]:
        errors[i] += -1 if down else 1
    if total == 0:
        return []
    place = count - 1 if count >= abs(total) else count
    return row[place : place + 1]


def slow_squant(x, low, high, kernels, channels):
    """(O, I, k) nested lists to integers, one channel after the other."""
    made = []
    for channel in x:
        u = {(i, j): v for i, kernel in enumerate(channel) for j, v in enumerate(kernel)}
        errors = {at: min(max(round(v), low), high) - v for at, v in u.items()}
        left = [at for at, e in errors.items() if (e < 0 and u[at] < high) or (e > 0 and u[at] > low)]
        if kernels and len(channel[0]) > 1:
            rest = []
            for i in range(len(channel)):
                group = {at: errors[at] for at in errors if at[0] == i}
                rest += slow_flip(group, [at for at in left if at[0] == i])
                errors.update(group)
            left = rest
        if channels:
            slow_flip(errors, left)
        made.append([[round(v + errors[i, j]) for j, v in enumerate(kernel)] for i, kernel in enumerate(channel)])
    return made


@settings(max_examples=60)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(3, 5, 9), (2, 4, 1), (1, 7, 4), (4, 1, 9)]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(-1000, 1000), (-4, 3), (-2, 1)]),
)
def test_against_a_slow_transcription(seed, shape, kernels, channels, ends):
    low, high = ends
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (x * min(high, 3)).clamp(low - 0.4, high + 0.4)  # a rounded zero point shifts weights by half a step at most
    rounding = SQuantRounding(kernels=kernels, channels=channels)
    found = integers(rounding, x.unsqueeze(-1), tensor(low), tensor(high)).squeeze(-1)
    assert found.int().tolist() == slow_squant(x.tolist(), low, high, kernels, channels)


# --- properties ------------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 2, 3]), st.sampled_from([1, 3]))


@given(shapes, st.integers(0, 2**31))
def test_every_sum_is_bounded(shape, seed):
    x = random(*shape, seed=seed)
    error = integers(BOTH, x) - x
    assert error.abs().max() < 1
    assert error.flatten(2).sum(2).abs().max() <= 1 + 1e-4
    assert error.flatten(1).sum(1).abs().max() <= 0.5 + 1e-4
    assert (integers(E, x) - x).abs().max() <= 0.5
    if x[0, 0].numel() > 1:
        assert (integers(K, x) - x).flatten(2).sum(2).abs().max() <= 0.5 + 1e-4
    assert (integers(C, x) - x).flatten(1).sum(1).abs().max() <= 0.5 + 1e-4


@given(shapes, st.integers(2, 8), st.integers(0, 2**31))
def test_the_ends_of_the_grid_are_respected(shape, bits, seed):
    layer = nn.Conv2d(shape[1], shape[0], shape[2:])
    layer.weight.data = random(*shape, seed=seed)
    rows = PER_CHANNEL.granularity.rows(layer.weight.data, 0)
    grid = affine(*MinMax().of(rows, bits, PER_CHANNEL, True), bits, PER_CHANNEL)
    x = layer.weight.data / grid.scale.view(-1, 1, 1, 1)
    low, high = (end - grid.zero_point.view(-1, 1, 1, 1) for end in (grid.low, grid.high))
    found = integers(BOTH, x, low, high)
    assert ((found >= low) & (found <= high)).all()
    assert (found - x).abs().max() < 1
    quantize_weight(layer, bits, PER_CHANNEL, MinMax(), BOTH)
    assert_close(layer.weight.detach(), found * grid.scale.view(-1, 1, 1, 1))


def test_a_flip_that_would_leave_the_grid_is_not_made():
    x = torch.full((1, 1, 2, 2), 1.4)
    assert integers(BOTH, x, tensor(0.0), tensor(1.0)).tolist() == torch.ones(1, 1, 2, 2).tolist()
    x = torch.full((1, 1, 2, 2), -0.4)
    assert integers(BOTH, x, tensor(0.0), tensor(1.0)).tolist() == torch.zeros(1, 1, 2, 2).tolist()


def test_a_constant_image_keeps_its_outputs():
    ones = torch.ones(1, 64, 3, 3)
    layers = {}
    for name, rounding in (("float", None), ("nearest", Nearest()), ("squant", BOTH)):
        layer = nn.Conv2d(64, 8, 3, bias=False)
        layer.weight.data = torch.rand(8, 64, 3, 3, generator=torch.Generator().manual_seed(0)) - 0.5
        if rounding is not None:
            quantize_weight(layer, 4, PER_CHANNEL, MinMax(), rounding)
            scale = layer.parametrizations.weight[0].scale.flatten()
        layers[name] = layer(ones).flatten().detach()
    errors = {name: ((out - layers["float"]) / scale).abs() for name, out in layers.items()}
    assert errors["squant"].max() <= 0.5 + 1e-3
    assert errors["nearest"].max() > 5


def test_permuted_channels_permute_the_result_and_nothing_else():
    x = random(5, 6, 3, 3)
    out = integers(BOTH, x)
    for dim in (0, 1):
        order = torch.randperm(x.shape[dim], generator=torch.Generator().manual_seed(dim))
        assert torch.equal(integers(BOTH, x.index_select(dim, order)), out.index_select(dim, order))
    assert torch.equal(integers(BOTH, x[:2]), out[:2])


@pytest.mark.parametrize("shape", [(4, 6, 1, 1), (4, 6)])
def test_kernels_of_one_element_are_left_to_the_channel(shape):
    x = random(*shape)
    assert torch.equal(integers(K, x), x.round())
    assert torch.equal(integers(BOTH, x), integers(C, x))
    assert not torch.equal(integers(C, x), x.round())


def test_a_depthwise_layer_is_solved_by_its_kernels():
    x = random(8, 1, 3, 3)
    assert torch.equal(integers(BOTH, x), integers(K, x))


def test_dead_channels_stay_zero():
    x = torch.zeros(2, 3, 3, 3)
    assert torch.equal(integers(BOTH, x), x)


# --- ranges of activations -------------------------------------------------------------------------------------------


def test_positive_sigma_by_hand():
    scheme = Scheme(symmetric=True)
    unsigned, signed = tensor([[0.0, 0.0, 1.0, 3.0]]), tensor([[-1.0, 1.0, -1.0, 1.0]])
    # positive entries 1 and 3: deviation sqrt(2); all of the other: sqrt(4 / 3)
    low, high = PositiveSigma(sigmas=2.0).of(unsigned, 8, scheme, False)
    assert (low.item(), high.item()) == (0, pytest.approx(2 * 2**0.5))
    low, high = PositiveSigma(sigmas=2.0).of(signed, 8, scheme, True)
    assert (-low.item(), high.item()) == pytest.approx([2 * (4 / 3) ** 0.5 / 1.25] * 2)


def test_below_6_bits_the_range_ends_at_what_was_seen():
    x = tensor([[0.0, 1.0, 2.0, 3.0]])
    assert PositiveSigma(sigmas=12.0).of(x, 4, Scheme(symmetric=True), False)[1].item() == 3
    assert PositiveSigma(sigmas=12.0).of(x, 6, Scheme(symmetric=True), False)[1].item() == 12


def test_positive_sigma_of_nothing_is_finite():
    for x in ([[0.0, 0.0]], [[0.0, 2.0]]):
        assert PositiveSigma().of(tensor(x), 8, Scheme(symmetric=True), False)[1].isfinite().all()
    with pytest.raises(RecipeError):
        PositiveSigma(sigmas=0.0)


def test_presets_are_the_settings_of_the_paper():
    squant = METHODS["squant"]
    sigmas = [squant.preset(name).quantizer[1].range.sigmas for name in ("paper", "a6", "a8")]
    assert sigmas == [12.0, 14.0, 25.0]
    stages = [squant.preset(name).quantizer[0].rounding for name in ("e", "k", "c", "paper")]
    assert stages == [E, K, C, BOTH]
