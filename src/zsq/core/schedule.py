"""Learning rates that change along the way."""

from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from zsq.core.errors import RecipeError
from zsq.core.recipe import Recipe

__all__ = ["MultiStep"]


@dataclass(frozen=True, kw_only=True)
class MultiStep(Recipe):
    """Multiply the learning rate by ``factor`` at each of some steps."""

    at: tuple[int, ...] = ()
    """Steps, ascending; none: the learning rate stays."""
    factor: float = 0.1

    def __post_init__(self) -> None:
        if list(self.at) != sorted(set(self.at)) or any(step < 1 for step in self.at):
            raise RecipeError(f"at must be ascending steps from 1 on, got {self.at}")
        if not 0 < self.factor <= 1:
            raise RecipeError(f"factor must lie in (0, 1], got {self.factor}")

    def build(self, optimizer: Optimizer) -> MultiStepLR:
        """The schedule; its ``step`` is called after each step of the optimizer."""
        return MultiStepLR(optimizer, list(self.at), self.factor)
