"""How a weight picks its grid point."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from zsq.core import Recipe

__all__ = ["AdaRound", "Constant", "LearnedRounding", "Nearest", "Rounding"]


class Rounding(Protocol):
    """A rule from weights in units of the scale to integers."""

    def build(self, x: Tensor, low: Tensor, high: Tensor) -> nn.Module:
        """A module from ``x = weight / scale`` (O, I, *kernel) to its integers; ``low`` and ``high`` end the grid."""


@dataclass(frozen=True, kw_only=True)
class Nearest(Recipe):
    """Each weight on its own, half to even."""

    def build(self, x: Tensor, low: Tensor, high: Tensor) -> nn.Module:
        """Rounding of whatever comes."""
        return _Nearest()


@dataclass(frozen=True, kw_only=True)
class AdaRound(Recipe):
    """Up or down by a learned variable (Nagel et al. 2020), from a base that is frozen at the start as in GENIE."""

    def build(self, x: Tensor, low: Tensor, high: Tensor) -> nn.Module:
        """The soft rounding, equal to ``x`` until it learns."""
        return LearnedRounding(x)


class _Nearest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.round()


class Constant(nn.Module):
    """Integers decided once."""

    integers: Tensor

    def __init__(self, integers: Tensor) -> None:
        super().__init__()
        self.register_buffer("integers", integers)

    def forward(self, x: Tensor) -> Tensor:
        """The integers, whatever ``x`` is."""
        return self.integers


class LearnedRounding(nn.Module):
    """B + h(V) with B = floor(x) constant and h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1), or B + [V >= 0] once hard.

    Because B is a constant, the scale that multiplies the result can be learned without moving the base.
    """

    base: Tensor

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.register_buffer("base", x.floor())
        rest = x - self.base  # in [0, 1), where the rectified sigmoid can be inverted
        self.logits = nn.Parameter(-(1.2 / (rest + 0.1) - 1).log())
        self.hard = False

    def share(self) -> Tensor:
        """h(V), how far up each weight is rounded, in [0, 1]."""
        return (1.2 * self.logits.sigmoid() - 0.1).clamp(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The integers, or what lies between them while the rounding is soft; ``x`` itself is not looked at."""
        return self.base + ((self.logits >= 0).to(self.base.dtype) if self.hard else self.share())

    def undecided(self, beta: float) -> Tensor:
        """sum(1 - |2 h - 1|^beta): how many weights are not yet at 0 or 1. AdaRound's regularizer."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()
