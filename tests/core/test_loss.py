from dataclasses import dataclass

import pytest
import torch

from zsq.core import Loss, Objective, RecipeError, View, start


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
