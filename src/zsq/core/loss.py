"""Loss and Objective: one equation each, and weighted sums that print as the equation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from zsq.core.errors import RecipeError
from zsq.core.recipe import Recipe, snake

if TYPE_CHECKING:
    from zsq.core.method import Job
    from zsq.core.teacher import View

__all__ = ["Loss", "Objective", "start"]


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


def start(loss: Loss | Objective, job: Job) -> Callable[[View], Tensor]:
    """The weighted sum of ``loss`` as a function of a view, with the memory of one optimisation."""
    terms = [(term.weight, term.begin(job)) for term in _terms(loss)]

    def total(view: View) -> Tensor:
        values = [weight * term(view) for weight, term in terms]
        return sum(values[1:], values[0])

    return total


def _terms(loss: Loss | Objective) -> tuple[Loss, ...]:
    return loss.terms if isinstance(loss, Objective) else (loss,)
