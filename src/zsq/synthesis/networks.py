"""Generator architectures: latents (N, D) or (N, ...) to images."""

from dataclasses import dataclass

from torch import nn

from zsq.core import Recipe, RecipeError, check_counts

__all__ = ["UpsampleGenerator"]


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
        channels, height, width = input_shape
        if height % 4 or width % 4:
            raise RecipeError(f"this generator makes images whose sides are divisible by 4, not {height}x{width}")
        return nn.Sequential(
            nn.Linear(self.latent, self.wide * (height // 4) * (width // 4)),
            nn.Unflatten(1, (self.wide, height // 4, width // 4)),
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
