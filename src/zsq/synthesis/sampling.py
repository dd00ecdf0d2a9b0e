"""What images start from: label samplers, first pixels; and what is done to an image before it is looked at."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq.core import Recipe, RecipeError, Transform, check_counts, check_positive

__all__ = [
    "CropAndFlip",
    "DeadLeaves",
    "GaussianPixels",
    "InTurn",
    "LowPass",
    "Shift",
    "ShiftAndFlip",
    "UniformLabels",
    "UniformPixels",
]


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
class DeadLeaves(Recipe):
    """Flat ellipses and boxes that fall onto each other: the cheapest image with the edges and scales of a photograph.

    The model is Lee et al.'s (IJCV 2001); that networks learn from such images is Baradad et al.'s (NeurIPS 2021).
    Radii have the density r^-power; centres, angles and aspect ratios (1/2 to 2) are uniform, the last in logarithm.
    """

    shapes: int = 60
    """How many, above a flat ground."""
    smallest: float = 0.04
    """Least radius, as a share of the shorter side."""
    largest: float = 0.6
    power: float = 3.0
    """Falling-off of the radii; at 3 every scale covers as much."""
    colour: float = 0.4
    """How far the channels of a shape differ: 0 is grey, 1 makes them independent."""
    std: float = 1.1
    """Standard deviation of a channel over shapes, in normalised space."""

    def __post_init__(self) -> None:
        check_counts(self, "shapes")
        check_positive(self, "std")
        if not (0 < self.smallest < self.largest and self.power > 1 and 0 <= self.colour <= 1):
            raise RecipeError(f"0 < smallest < largest, power above 1 and colour in [0, 1] are asked, got {self}")

    def draw(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Pixels of ``shape`` (N, C, H, W); borders of shapes are smooth over one pixel."""
        count, channels, height, width = shape
        side = min(height, width)
        numbers = torch.rand(self.shapes, 6, count, 1, 1, generator=rng)
        common = torch.randn(self.shapes + 1, count, 1, 1, 1, generator=rng)
        own = torch.randn(self.shapes + 1, count, channels, 1, 1, generator=rng)
        ground, *colours = self.std * (math.sqrt(1 - self.colour**2) * common + self.colour * own)
        images: Tensor = ground.expand(shape).clone()
        y, x = (torch.arange(height)[:, None] + 0.5) / side, (torch.arange(width) + 0.5) / side
        for colour, (size, down, right, turn, stretch, box) in zip(colours, numbers, strict=True):
            radius, aspect = self._radius(size), 2 ** (stretch - 0.5)  # semi-axes: radius times and over aspect
            dy, dx = y - down * (height / side), x - right * (width / side)  # (N, H, W)
            sin, cos = torch.sin(math.pi * turn), torch.cos(math.pi * turn)
            u, v = (cos * dx + sin * dy) / (radius * aspect), (cos * dy - sin * dx) / (radius / aspect)
            # the box has the area of the ellipse: 4 a^2 = pi
            far = torch.where(box < 0.5, torch.maximum(u.abs(), v.abs()) * (2 / math.sqrt(math.pi)), torch.hypot(u, v))
            covered = ((1 - far) * radius * side + 0.5).clamp(0, 1)[:, None]  # (N, 1, H, W)
            images.lerp_(colour, covered)
        return images

    def _radius(self, share: Tensor) -> Tensor:
        """The radius, as a share of the side, below which ``share`` of all lie."""
        exponent = 1 - self.power
        least: float = self.smallest**exponent
        most: float = self.largest**exponent
        return (least + (most - least) * share).pow(1 / exponent)


class Shift(NamedTuple):
    """How a batch is moved: rolled by so many pixels, then mirrored left to right or not."""

    down: int
    right: int
    mirrored: bool

    def move(self, images: Tensor) -> Tensor:
        """``images`` (N, C, H, W), all moved alike."""
        moved = images.roll((self.down, self.right), (2, 3))
        return moved.flip(3) if self.mirrored else moved


@dataclass(frozen=True, kw_only=True)
class ShiftAndFlip(Recipe):
    """Roll the batch by a few pixels up or down and left or right, and mirror it half of the time."""

    limit: float = 1 / 8
    """Largest shift as a share of the side, so that it means the same at every size."""
    diagonal: bool = False
    """Shift both ways by the same number of pixels."""
    flip: bool = True
    """Mirror left to right with probability one half."""

    def __post_init__(self) -> None:
        if not 0 <= self.limit <= 1:
            raise RecipeError(f"a shift is a share of the side from 0 to 1, got limit {self.limit}")

    def draw(self, images: Tensor, rng: torch.Generator) -> Shift:
        """The move of one look at ``images`` (N, C, H, W)."""
        limits = [round(self.limit * side) for side in images.shape[2:]]
        if self.diagonal:
            limits = [min(limits)]
        offsets = [int(torch.randint(-each, each + 1, (1,), generator=rng)) for each in limits]
        mirrored = self.flip and torch.rand(1, generator=rng).item() < 0.5
        return Shift(offsets[0], offsets[-1], mirrored)

    def move(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """``images`` (N, C, H, W), all moved alike."""
        return self.draw(images, rng).move(images)


@dataclass(frozen=True, kw_only=True)
class InTurn(Recipe):
    """One transform for the first half of the steps, another for the second."""

    first: Transform
    second: Transform

    def at(self, progress: float) -> Transform:
        """The transform when this share of the steps is done."""
        return self.first if progress < 0.5 else self.second


@dataclass(frozen=True, kw_only=True)
class CropAndFlip(Recipe):
    """Show each image a random part of itself, resized to the whole and mirrored half of the time.

    As torchvision's RandomResizedCrop: the part has a share of the area uniform in ``scale`` .. 1 and an aspect ratio
    log-uniform in 3/4 .. 4/3. It is read bilinearly at real-valued positions and lies within the image.
    """

    scale: float = 0.5
    """Least share of the area."""
    probability: float = 1.0
    """How often a batch is cropped at all; otherwise all of its images pass unchanged."""

    def __post_init__(self) -> None:
        if not (0 < self.scale <= 1 and 0 <= self.probability <= 1):
            raise RecipeError(f"scale must lie in (0, 1] and probability in [0, 1], got {self}")

    def move(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """``images`` (N, C, H, W), each cropped on its own."""
        cropped = torch.rand(1, generator=rng).item() < self.probability
        area, ratio, right, down, flip = torch.rand(5, len(images), generator=rng)
        if not cropped:
            return images
        area = self.scale + (1 - self.scale) * area
        stretch = (4 / 3) ** (2 * ratio - 1)
        # sides as shares of the image's; a side that would stick out ends at the border
        width, height = (area * stretch).sqrt().clamp(max=1), (area / stretch).sqrt().clamp(max=1)
        x, y = (1 - width) * (2 * right - 1), (1 - height) * (2 * down - 1)  # centres, the image being -1 .. 1
        mirrored = torch.where(flip < 0.5, -width, width)
        nothing = torch.zeros_like(x)
        theta = torch.stack([mirrored, nothing, x, nothing, height, y], 1).view(-1, 2, 3).to(images)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True, kw_only=True)
class LowPass(Recipe):
    """Damp high frequencies by a Gaussian: gain exp(-d^2 / (2 D0^2)) at distance d from zero frequency (SynQ, Eq. 4).

    Distances count periods along the image's side. D0 is given as a share of that side, so that it means the same
    at every size: SynQ's 80 at 224 pixels is 0.357.
    """

    cutoff: float = 80 / 224
    """D0 divided by the side; the gain there is 0.607."""

    def __post_init__(self) -> None:
        check_positive(self, "cutoff")

    def move(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """``images`` (N, C, H, W), filtered; nothing is drawn."""
        height, width = images.shape[2:]
        u, v = torch.fft.fftfreq(height, device=images.device), torch.fft.rfftfreq(width, device=images.device)
        gain = torch.exp(-(u[:, None] ** 2 + v**2) / (2 * self.cutoff**2)).to(images.dtype)
        filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(images) * gain, s=(height, width))
        return filtered
