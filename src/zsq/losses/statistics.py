"""BatchNorm statistics as an objective: one loss with the options in which the papers differ."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from zsq.core import BNInput, Loss, RecipeError, View, channel_sums

__all__ = ["BNStatistics", "ImageStatistics", "moments"]


@dataclass(frozen=True, kw_only=True)
class BNStatistics(Loss):
    """Distance between the statistics that enter each BatchNorm layer and the ones it recorded in training.

    sum_l w_l * ( d(mean_l, running_mean_l) + d(spread_l, running_spread_l) ), with d the squared difference reduced
    over the channels. The defaults are ZeroQ's; table 2b of the method cards lists who uses which option.
    """

    over: Literal["image", "batch"] = "image"
    """Statistics of each image over (H, W), averaged over the images, or of the batch over (N, H, W)."""
    spread: Literal["std", "var"] = "std"
    """The second statistic: standard deviation or variance."""
    unbiased: bool = True
    """Divide the variance by n - 1 instead of n."""
    channels: Literal["sum", "mean", "norm"] = "sum"
    """Reduction over the channels of a layer: of the squares, or the un-squared L2 norm."""
    layers: Literal["sum", "mean"] = "sum"
    """Reduction over layers."""
    margin: float = 0.0
    """Deviations below this are free (DSG's slack), in units of the statistic."""
    first_layer: float = 1.0
    """Extra factor of the first layer (DeepInversion takes 10)."""
    eps: float = 1e-6
    """Added to variances under a square root."""

    needs: ClassVar[frozenset[str]] = frozenset({"bn"})

    def __post_init__(self) -> None:
        if self.margin < 0 or self.eps < 0:
            raise RecipeError(f"margin and eps cannot be negative, got {self.margin} and {self.eps}")

    def value(self, view: View) -> Tensor:
        """The distance, a scalar."""
        terms = [self._layer(layer) for layer in view.bn]
        terms[0] = self.first_layer * terms[0]
        total = torch.stack(terms)
        reduced: Tensor = total.sum() if self.layers == "sum" else total.mean()
        return reduced

    def _layer(self, layer: BNInput) -> Tensor:
        mean, var = _moments(layer.x, *layer.sums, self.over, self.unbiased)
        if self.spread == "std":
            spread, target = (var + self.eps).sqrt(), (layer.var + self.eps).sqrt()
        else:
            spread, target = var, layer.var
        return self._distance(mean - layer.mean) + self._distance(spread - target)

    def _distance(self, gap: Tensor) -> Tensor:
        """``gap`` (R, C), one row an image or the batch, to a scalar: the mean over rows."""
        if self.margin:
            gap = (gap.abs() - self.margin).clamp(min=0)
        if self.channels == "norm":
            norm: Tensor = torch.linalg.vector_norm(gap, dim=1)
            return norm.mean()
        squares = gap.square()
        return squares.sum(1).mean() if self.channels == "sum" else squares.mean()


@dataclass(frozen=True, kw_only=True)
class ImageStatistics(Loss):
    """Mean 0 and standard deviation 1 of every normalised image, per channel over (H, W): the input as one more layer.

    (1 / N) sum_n sum_c mean_nc^2 + (std_nc - 1)^2.
    """

    eps: float = 1e-6
    """Added to the variance and to its target 1 under the square root."""

    def value(self, view: View) -> Tensor:
        """The distance, a scalar."""
        mean, var = moments(view.images, "image")
        spread = (var + self.eps).sqrt() - (1 + self.eps) ** 0.5
        distance: Tensor = mean.square() + spread.square()
        return distance.sum(1).mean()


def moments(x: Tensor, over: Literal["image", "batch"], unbiased: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``x`` (N, C, ...) per channel, (N, C) over each image or (1, C) over the batch.

    A map of one pixel has no variance of its own: there the statistics of the batch stand in for the image's.
    """
    return _moments(x, *channel_sums(x), over, unbiased)


def _moments(
    x: Tensor, total: Tensor, squares: Tensor, over: Literal["image", "batch"], unbiased: bool
) -> tuple[Tensor, Tensor]:
    """``moments`` where the sums (N, C) are known."""
    count = x[0, 0].numel()
    if over == "batch" or count == 1:
        total, squares, count = total.sum(0, keepdim=True), squares.sum(0, keepdim=True), count * len(x)
    mean = total / count
    var = (squares - total * mean) / max(count - int(unbiased), 1)
    return mean, var.clamp(min=0)  # rounding may push a flat map below zero
