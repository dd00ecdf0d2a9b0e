"""What images start from: label samplers, first pixels, and the jitters that move an image before it is looked at."""

from dataclasses import dataclass

import torch
from torch import Tensor

from zsq.core import Recipe, RecipeError, check_positive

__all__ = ["GaussianPixels", "ShiftAndFlip", "UniformLabels", "UniformPixels"]


@dataclass(frozen=True, kw_only=True)
class UniformLabels(Recipe):
    """Every class equally likely."""

    def draw(self, count: int, classes: int, rng: torch.Generator) -> Tensor:
        """Class indices (``count``,)."""
        return torch.randint(classes, (count,), generator=rng)


@dataclass(frozen=True, kw_only=True)
class GaussianPixels(Recipe):
    """Independent normal pixels in normalised space."""

    std: float = 1.0
    """Standard deviation; 1 is what a normalised photograph has."""

    def __post_init__(self) -> None:
        check_positive(self, "std")

    def draw(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Pixels of ``shape`` (N, C, H, W)."""
        return torch.randn(shape, generator=rng) * self.std


@dataclass(frozen=True, kw_only=True)
class UniformPixels(Recipe):
    """Independent uniform pixels between ``low`` and ``high`` in normalised space."""

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise RecipeError(f"low must be below high, got {self.low} and {self.high}")

    def draw(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Pixels of ``shape`` (N, C, H, W)."""
        return torch.rand(shape, generator=rng) * (self.high - self.low) + self.low


@dataclass(frozen=True, kw_only=True)
class ShiftAndFlip(Recipe):
    """Roll the batch by up to ``limit`` pixels in both directions and mirror it half of the time."""

    limit: int = 4
    """Largest shift in pixels."""
    flip: bool = True
    """Mirror left to right with probability one half."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise RecipeError(f"a shift cannot be negative, got limit {self.limit}")

    def move(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """``images`` (N, C, H, W), all moved alike."""
        down, right = torch.randint(-self.limit, self.limit + 1, (2,), generator=rng).tolist()
        moved = images.roll((down, right), (2, 3))
        return moved.flip(3) if self.flip and torch.rand(1, generator=rng).item() < 0.5 else moved
