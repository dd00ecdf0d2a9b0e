"""Loss and Objective: one equation each, and weighted sums that print as the equation."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from zsq.core.errors import RecipeError, RunError
from zsq.core.recipe import Recipe, snake

if TYPE_CHECKING:
    from zsq.core.method import Job
    from zsq.core.teacher import View

__all__ = ["Loss", "Objective", "Total", "start"]


@dataclass(frozen=True, kw_only=True)
class Loss(Recipe):
    """One term: a scalar computed from what a forward pass showed. ``needs`` lists what it looks at."""

    weight: float = 1.0
    """Coefficient of the term in a sum."""

    @abstractmethod
    def value(self, view: View) -> Tensor:
        """The unweighted scalar."""

    def begin(self, job: Job) -> Callable[[View], Tensor]:
        """The unweighted term for one optimisation; a loss that remembers earlier batches overrides this."""
        return self.value

    def __rmul__(self, factor: float) -> Self:
        return self.with_part("weight", factor * self.weight)

    def __add__(self, other: Loss | Objective) -> Objective:
        return Objective(terms=(self, *_terms(other)))

    def __str__(self) -> str:
        return type(self).__name__ if self.weight == 1 else f"{self.weight:g} * {type(self).__name__}"


@dataclass(frozen=True, kw_only=True)
class Objective(Recipe):
    """A sum of weighted losses; its parts are reached by class name: ``loss.cross_entropy.weight``."""

    terms: tuple[Loss, ...]

    def parts(self) -> dict[str, Any]:
        """The terms by name."""
        named = {snake(type(term).__name__): term for term in self.terms}
        if len(named) < len(self.terms):
            raise RecipeError(f"two terms of one class in {self}: give one of them a class of its own")
        return named

    def with_part(self, name: str, value: Any) -> Self:
        """A copy in which the named term is ``value``."""
        return type(self)(terms=tuple(value if key == name else term for key, term in self.parts().items()))

    def part_type(self, name: str) -> Any:
        """Any loss may stand in for a term."""
        return Loss

    def __add__(self, other: Loss | Objective) -> Objective:
        return Objective(terms=(*self.terms, *_terms(other)))

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms))


class Total:
    """The weighted sum of the terms of a loss as a function of a view, with the memory of one optimisation."""

    def __init__(self, terms: dict[str, tuple[float, Callable[[View], Tensor]]]) -> None:
        self._terms = terms
        self._values: dict[str, Tensor] = {}

    def __call__(self, view: View) -> Tensor:
        """The weighted sum, a scalar."""
        values = {name: weight * term(view) for name, (weight, term) in self._terms.items()}
        self._values = {name: value.detach() for name, value in values.items()}
        first, *rest = values.values()
        return sum(rest, first)

    def check(self, label: str, step: int) -> None:
        """Return if the last value was finite.

        Raises:
            RunError: if it was not; the message says which term at which step. What was saved before is kept.
        """
        values = torch.stack([value.reshape(()) for value in self._values.values()])
        if not values.isfinite().all():
            wrong = [f"{name} is {value:g}" for name, value in self.numbers().items() if not math.isfinite(value)]
            raise RunError(
                f"{label} diverged at step {step}: {', '.join(wrong)}; a lower learning rate may help "
                "(the last checkpoint and all finished pieces are kept)"
            )

    def numbers(self) -> dict[str, float]:
        """The weighted terms of the last value by name, for the log."""
        return {name: value.item() for name, value in self._values.items()}


def start(loss: Loss | Objective, job: Job) -> Total:
    """``loss`` as a function of a view, with the memory of one optimisation."""
    return Total({snake(type(term).__name__): (term.weight, term.begin(job)) for term in _terms(loss)})


def _terms(loss: Loss | Objective) -> tuple[Loss, ...]:
    return loss.terms if isinstance(loss, Objective) else (loss,)
