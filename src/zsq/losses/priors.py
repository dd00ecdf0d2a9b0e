"""What an image should look like, whatever a network sees in it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zsq.core import Job, Loss, RecipeError, View

__all__ = ["TotalVariation", "noise_variation", "total_variation"]


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Loss):
    """The size of the differences between neighbouring pixels of a batch, as four un-squared Frobenius norms.

    |right| + |down| + |diagonal| + |anti-diagonal|, each over the whole batch (N, C, H, W). With a target c it is
    driven there, as |TV - c|. Targets are given for 32 images of (3, 224, 224), where unit Gaussian noise has 12,374.
    For another shape they are multiplied by what noise has there, divided by 12,374, so that c asks for the same
    contrast of neighbours at any size.
    """

    target: tuple[float, float] | None = None
    """Ends of the uniform distribution from which c is drawn for each batch; None: the smaller the better."""
    still: bool = False
    """Read the images before they were moved for the look: what a roll puts side by side are no neighbours."""

    def __post_init__(self) -> None:
        if self.target is not None and not 0 <= self.target[0] <= self.target[1]:
            raise RecipeError(f"target must be the two ends of a range from 0 up, got {self.target}")

    def begin(self, job: Job) -> Callable[[View], Tensor]:
        """The term with the target of one batch."""
        if self.target is None:
            return self.value
        share = torch.rand(1, generator=job.run.generator("variation")).item()
        target = self.target[0] + share * (self.target[1] - self.target[0])
        return lambda view: self.distance(view, target)

    def value(self, view: View) -> Tensor:
        """The term, a scalar; of a range of targets its middle."""
        return self.distance(view, None if self.target is None else sum(self.target) / 2)

    def distance(self, view: View, target: float | None) -> Tensor:
        """The variation, or its distance from ``target``, which is that of 32 images of (3, 224, 224)."""
        images = view.pixels if self.still else view.images
        found = total_variation(images)
        if target is None:
            return found
        return (found - target * noise_variation(images.shape) / noise_variation((32, 3, 224, 224))).abs()


def total_variation(x: Tensor) -> Tensor:
    """The sum of the four norms for ``x`` (N, C, H, W), a scalar."""
    pairs = (
        (x[..., 1:], x[..., :-1]),
        (x[..., 1:, :], x[..., :-1, :]),
        (x[..., 1:, 1:], x[..., :-1, :-1]),
        (x[..., 1:, :-1], x[..., :-1, 1:]),
    )
    return torch.stack([torch.linalg.vector_norm(a - b) for a, b in pairs]).sum()


def noise_variation(shape: tuple[int, ...]) -> float:
    """The total variation of unit Gaussian noise of ``shape`` (N, C, H, W): a difference has variance 2.

    >>> round(noise_variation((32, 3, 224, 224)))
    12374
    """
    count, channels, height, width = shape
    edges = (height * (width - 1), (height - 1) * width, *[(height - 1) * (width - 1)] * 2)
    return float(sum((2 * count * channels * each) ** 0.5 for each in edges))
