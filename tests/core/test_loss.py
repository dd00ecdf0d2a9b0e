import math
import re
from dataclasses import dataclass

import pytest
import torch

from zsq.core import Loss, Objective, RecipeError, RunError, View, start


@dataclass(frozen=True, kw_only=True)
class Mean(Loss):
    def value(self, view):
        return view.logits.mean()


@dataclass(frozen=True, kw_only=True)
class Square(Loss):
    power: float = 2.0

    def value(self, view):
        return view.logits.pow(self.power).mean()


@dataclass(frozen=True, kw_only=True)
class Count(Loss):
    """Remembers how often it was asked."""

    def value(self, view):
        raise AssertionError("begin stands in")

    def begin(self, job):
        calls = []

        def term(view):
            calls.append(1)
            return torch.tensor(float(len(calls)))

        return term


VIEW = View(images=torch.zeros(1, 3, 2, 2), logits=torch.tensor([[1.0, 3.0]]))


def test_a_weighted_sum_by_hand():
    # mean 2, mean square (1 + 9) / 2 = 5: 2 + 0.1 * 5
    assert start(Mean() + 0.1 * Square(), None)(VIEW).item() == pytest.approx(2.5)
    assert start(3 * Mean(), None)(VIEW).item() == pytest.approx(6.0)
    assert start(Mean(), None)(VIEW).item() == 2.0


def test_the_arithmetic_is_that_of_sums():
    assert 2 * (3 * Mean()) == 6 * Mean() == Mean(weight=6.0)
    assert Mean() + Square() + Count() == Mean() + (Square() + Count())
    assert Mean() + Square() == Objective(terms=(Mean(), Square()))
    assert Mean() != 2 * Mean()


def test_it_prints_as_the_equation():
    assert str(Mean() + 0.1 * Square()) == "Mean + 0.1 * Square"
    assert str(3 * Mean()) == "3 * Mean"


def test_two_terms_of_one_class_are_refused():
    with pytest.raises(RecipeError, match=r"two terms of one class in Mean \+ 2 \* Mean"):
        (Mean() + 2 * Mean()).parts()


def test_a_memory_lasts_for_one_optimisation():
    objective = Mean() + Count()
    first = start(objective, None)
    assert [first(VIEW).item(), first(VIEW).item()] == [3.0, 4.0]
    assert start(objective, None)(VIEW).item() == 3.0


def test_a_term_is_reached_by_its_name():
    changed = (Mean() + Square()).override({"square.power": 3.0, "mean.weight": 0.5})
    assert changed == 0.5 * Mean() + Square(power=3.0)


def test_the_terms_are_told_apart_in_numbers():
    # mean 2, mean square 5
    total = start(Mean() + 0.1 * Square(), None)
    total(VIEW)
    assert total.numbers() == pytest.approx({"mean": 2.0, "square": 0.5})
    total(View(VIEW.images, 2 * VIEW.logits))
    assert total.numbers() == pytest.approx({"mean": 4.0, "square": 2.0})  # of the last look


def test_the_gradient_is_that_of_the_weighted_sum():
    # d/dz of mean(z) + 0.1 mean(z^2) = 1/2 + 0.1 z
    logits = VIEW.logits.clone().requires_grad_()
    start(Mean() + 0.1 * Square(), None)(View(VIEW.images, logits)).backward()
    assert logits.grad.tolist() == [pytest.approx([0.6, 0.8])]


@pytest.mark.parametrize(("logit", "word"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_a_value_that_is_not_finite_names_its_term_and_step(logit, word):
    total = start(Square(power=1.0) + Count(), None)
    total(View(VIEW.images, torch.full((1, 2), logit)))
    with pytest.raises(RunError, match=rf"^distill diverged at step 7: square is {word}; a lower learning rate may"):
        total.check("distill", 7)


def test_every_term_that_is_not_finite_is_named():
    total = start(Mean() + 2 * Square() + Count(), None)
    total(View(VIEW.images, torch.full((1, 2), -math.inf)))
    with pytest.raises(RunError, match=re.escape("mean is -inf, square is inf; ")):
        total.check("synthesize", 0)


def test_finite_values_pass_however_large():
    total = start(Mean() + Square(), None)
    total(View(VIEW.images, torch.full((1, 2), 1e18)))
    total.check("distill", 0)


def test_a_check_is_of_the_last_value():
    total = start(Mean(), None)
    total(View(VIEW.images, torch.full((1, 2), math.nan)))
    total(VIEW)
    total.check("distill", 1)
