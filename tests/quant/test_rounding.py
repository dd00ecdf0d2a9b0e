import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close

from zsq.quant import AdaRound, Nearest
from zsq.quant.reconstruct import annealed
from zsq.quant.rounding import Constant, LearnedRounding

UNBOUNDED = tensor(-1e9), tensor(1e9)


def learned(*x):
    return LearnedRounding(tensor(x))


def with_share(share):
    """A rounding whose rectified sigmoid is ``share``, set through the logit and not through its inverse."""
    rounding = learned(0.5)
    p = (tensor(share, dtype=torch.float64) + 0.1) / 1.2
    rounding.logits = torch.nn.Parameter((p / (1 - p)).log().reshape(1))
    return rounding


def test_rectified_sigmoid_by_hand():
    rounding = learned(0.5, 3.0, -1.75)  # rests 0.5, 0, 0.25
    assert_close(rounding.logits.detach(), tensor([0.0, -2.3979, -0.8873]), atol=1e-4, rtol=0)
    assert rounding.share().tolist() == pytest.approx([0.5, 0.0, 0.25], abs=1e-6)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1))
def test_soft_rounding_starts_at_the_float_weight(x):
    rounding = learned(*x)
    assert rounding.logits.abs().max() <= 2.3979
    assert_close(rounding(tensor(x)), tensor(x), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(
    ("share", "beta", "expected"),
    [(0.5, 20, 1), (0.5, 2, 1), (0.1, 20, 0.9885), (0.1, 11, 0.9141), (0.1, 2, 0.36), (0.9, 2, 0.36)],
)
def test_undecided_by_hand(share, beta, expected):
    assert with_share(share).undecided(beta).item() == pytest.approx(expected, abs=1e-4)


def test_undecided_is_zero_once_decided_and_sums_over_weights():
    rounding = learned(0.5, 0.5)
    rounding.logits.data = tensor([-5.0, 5.0])
    assert rounding.undecided(2.0).item() == 0
    rounding.logits.data = tensor([0.0, 0.0])
    assert rounding.undecided(2.0).item() == 2


@pytest.mark.parametrize(("step", "beta"), [(0, None), (3999, None), (4000, 20.0), (12000, 11.0), (20000, 2.0)])
def test_schedule_of_the_exponent(step, beta):
    assert annealed(step, 20_000, 0.2, (20.0, 2.0)) == beta


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=10), st.integers(0, 1000))
def test_hard_rounding_is_floor_or_floor_plus_one(x, seed):
    rounding = learned(*x)
    rounding.logits.data = torch.randn(len(x), generator=torch.Generator().manual_seed(seed))
    rounding.hard = True
    up = rounding(tensor(x)) - tensor(x).floor()
    assert torch.equal(up, (rounding.logits >= 0).float())


def test_the_base_of_learned_rounding_does_not_move_with_x():
    x = tensor([0.3, 1.7])
    rounding = AdaRound().build(x, *UNBOUNDED)
    before = rounding(x).detach()
    assert torch.equal(rounding(x * 3).detach(), before)


def test_nearest_rounds_half_to_even_and_constants_stay():
    assert Nearest().build(tensor([0.0]), *UNBOUNDED)(tensor([0.5, 1.5, -0.5, 2.4])).tolist() == [0, 2, 0, 2]
    assert Constant(tensor([3.0]))(tensor([0.1])).tolist() == [3.0]
