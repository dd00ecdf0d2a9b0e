"""Generator architectures: latents to images, and classes to latents."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from zsq.core import Job, Recipe, RecipeError, check_counts, check_positive

__all__ = [
    "ClassNoise",
    "ConditionalTrunk",
    "ConvTrunk",
    "Drawn",
    "LabelTimesNoise",
    "LatentCode",
    "Latents",
    "PlainNoise",
    "Trunk",
    "UpsampleGenerator",
]


@dataclass(frozen=True, kw_only=True)
class UpsampleGenerator(Recipe):
    """A linear layer and two upsampled 3x3 convolutions, as in GENIE: latents (N, ``latent``) to images (N, C, S, S).

    Its BatchNorm layers stay in train mode; the last one makes every batch have mean 0 and variance 1 per channel.
    """

    latent: int = 256
    """Size of one latent vector."""
    wide: int = 128
    """Channels at a quarter and half of the image side."""
    narrow: int = 64
    """Channels at the full side."""

    def __post_init__(self) -> None:
        check_counts(self, "latent", "wide", "narrow")

    def build(self, input_shape: tuple[int, int, int]) -> nn.Module:
        """A freshly initialised generator of images ``input_shape`` (C, H, W).

        Raises:
            RecipeError: if a side is not divisible by 4.
        """
        channels, height, width = _quartered(input_shape)
        return nn.Sequential(
            nn.Linear(self.latent, self.wide * height * width),
            nn.Unflatten(1, (self.wide, height, width)),
            nn.BatchNorm2d(self.wide),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(self.wide, self.narrow, 3, padding=1),
            nn.BatchNorm2d(self.narrow),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(self.narrow, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )


class Drawn(NamedTuple):
    """What a conditional generator makes N images of, each from S classes (one, unless classes are superposed)."""

    labels: Tensor
    """Class indices (N, S)."""
    shares: Tensor
    """How much of each class (N, S); they sum to 1 for each image."""
    noise: Tensor
    """(N, S, D)."""

    def targets(self, classes: int) -> Tensor:
        """The classes the images are made for: indices (N,) if each has one, else shares (N, K)."""
        if self.labels.shape[1] == 1:
            return self.labels[:, 0]
        return self.shares.new_zeros(len(self.labels), classes).scatter_add_(1, self.labels, self.shares)

    def to(self, device: torch.device) -> "Drawn":
        """The same on ``device``."""
        return Drawn(*(each.to(device) for each in self))


class LatentCode(Protocol):
    """A module from what was drawn to latent vectors (N, ``size``)."""

    size: int

    def __call__(self, drawn: Drawn) -> Tensor:
        """The vectors."""


class Latents(Protocol):
    """What a generator starts from."""

    def build(self, job: Job, classes: int) -> nn.Module:
        """A freshly initialised ``LatentCode``."""

    def draw(self, count: int, classes: int, code: nn.Module, rng: torch.Generator) -> Drawn:
        """What the next ``count`` images are made of."""


@dataclass(frozen=True, kw_only=True)
class ClassNoise(Recipe):
    """A class, all equally likely, and normal noise for each image."""

    latent: int = 100
    """Size of one latent vector."""

    def __post_init__(self) -> None:
        check_counts(self, "latent")

    def draw(self, count: int, classes: int, code: nn.Module, rng: torch.Generator) -> Drawn:
        """One class an image."""
        labels = torch.randint(classes, (count, 1), generator=rng)
        return Drawn(labels, torch.ones(count, 1), torch.randn(count, 1, self.latent, generator=rng))


@dataclass(frozen=True, kw_only=True)
class LabelTimesNoise(ClassNoise):
    """The learned embedding of the class times the noise, entry by entry (GDFQ at 32 pixels)."""

    def build(self, job: Job, classes: int) -> nn.Module:
        """An embedding table, normal at the start."""
        return _Multiplied(classes, self.latent)


@dataclass(frozen=True, kw_only=True)
class PlainNoise(ClassNoise):
    """The noise alone; the class enters elsewhere (GDFQ at 224 pixels)."""

    def build(self, job: Job, classes: int) -> nn.Module:
        """No parameters."""
        return _Noise(self.latent)


class Trunk(Protocol):
    """From latent vectors to images."""

    def build(self, size: int, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """A freshly initialised module from latents (N, ``size``) and what was drawn to images (N, C, H, W)."""


@dataclass(frozen=True, kw_only=True)
class ConvTrunk(Recipe):
    """A linear layer and three 3x3 convolutions with two upsamplings, as GDFQ's for 32 pixels.

    Its BatchNorm layers stay in train mode; the last one makes every batch have mean 0 and variance 1 per channel.
    """

    wide: int = 128
    """Channels at a quarter and half of the image side."""
    narrow: int = 64
    """Channels at the full side."""
    eps: float = 0.8
    """Of the BatchNorm layers behind convolutions: a momentum in the wrong place, and what made the figures."""

    def __post_init__(self) -> None:
        check_counts(self, "wide", "narrow")
        check_positive(self, "eps")

    def build(self, size: int, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """The trunk.

        Raises:
            RecipeError: if a side is not divisible by 4.
        """
        channels, height, width = _quartered(input_shape)
        first, second, third = (
            self.norm(each, eps, classes)
            for each, eps in ((self.wide, 1e-5), (self.wide, self.eps), (self.narrow, self.eps))
        )
        return _Trunk(
            nn.Linear(size, self.wide * height * width),
            nn.Unflatten(1, (self.wide, height, width)),
            first,
            nn.Upsample(scale_factor=2),
            nn.Conv2d(self.wide, self.wide, 3, padding=1),
            second,
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(self.wide, self.narrow, 3, padding=1),
            third,
            nn.LeakyReLU(0.2),
            nn.Conv2d(self.narrow, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def norm(self, channels: int, eps: float, classes: int) -> nn.Module:
        """The normalization of one stage."""
        return nn.BatchNorm2d(channels, eps)


@dataclass(frozen=True, kw_only=True)
class ConditionalTrunk(ConvTrunk):
    """The same with class-conditional normalization, a scale and a shift for each class (GDFQ at 224 pixels)."""

    superposed: Literal["sum", "mean"] = "sum"
    """How the parameters of superposed classes combine, each times its share; the mean is about 1/S of the sum."""

    def norm(self, channels: int, eps: float, classes: int) -> nn.Module:
        """The normalization of one stage."""
        return ConditionalNorm(channels, eps, classes, self.superposed)


class ConditionalNorm(nn.Module):
    """BatchNorm whose affine parameters belong to classes; scale 1 and shift 0 at the start."""

    def __init__(self, channels: int, eps: float, classes: int, superposed: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps, affine=False)
        self.scale = nn.Parameter(torch.ones(classes, channels))
        self.shift = nn.Parameter(torch.zeros(classes, channels))
        self.superposed = superposed

    def forward(self, x: Tensor, drawn: Drawn) -> Tensor:
        """``x`` (N, C, H, W) normalized, scaled and shifted by the classes of each image."""
        shares = drawn.shares[:, :, None] / (drawn.labels.shape[1] if self.superposed == "mean" else 1)
        scale, shift = ((shares * table[drawn.labels]).sum(1)[:, :, None, None] for table in (self.scale, self.shift))
        y: Tensor = scale * self.norm(x) + shift
        return y


class _Trunk(nn.Sequential):
    def forward(self, latents: Tensor, drawn: Drawn) -> Tensor:  # type: ignore[override]  # a Sequential of one input
        x = latents
        for layer in self:
            x = layer(x, drawn) if isinstance(layer, ConditionalNorm) else layer(x)
        return x


class _Multiplied(nn.Module):
    def __init__(self, classes: int, size: int) -> None:
        super().__init__()
        self.size, self.table = size, nn.Embedding(classes, size)

    def forward(self, drawn: Drawn) -> Tensor:
        latents: Tensor = self.table(drawn.labels[:, 0]) * drawn.noise[:, 0]
        return latents


class _Noise(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, drawn: Drawn) -> Tensor:
        return drawn.noise[:, 0]


def _quartered(input_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    channels, height, width = input_shape
    if height % 4 or width % 4:
        raise RecipeError(f"this generator makes images whose sides are divisible by 4, not {height}x{width}")
    return channels, height // 4, width // 4
