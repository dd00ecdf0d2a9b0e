"""How patches of an image differ, by what attention read for them."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq.core import Attention, Loss, RecipeError, View, check_positive

__all__ = ["PatchSimilarityEntropy", "kernel_entropy", "similarity_entropy"]


@dataclass(frozen=True, kw_only=True)
class PatchSimilarityEntropy(Loss):
    """Minus the differential entropy of the cosine similarities between patches, summed over the attentions.

    Of an image, the similarities S_ij of all pairs of patches, each patch being the mean over heads of what it read;
    where attention works in windows, of all pairs in each of them. Their density is that of a Gaussian kernel,
    p(t) = mean_ij exp(-(t - S_ij)^2 / (2 h^2)) / sqrt(2 pi h^2), at equally spaced points between the extremes of the
    batch, which are constants; the entropy is the trapezoid rule of -p ln p with p + 1e-4, the mean over images.
    """

    points: int = 10
    """Of the trapezoid rule."""
    bandwidth: float = 0.01
    """h of the kernel."""
    drop: int | None = None
    """How many tokens are left out of each attention, the first ones; None: those that are no patches."""

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    def __post_init__(self) -> None:
        if self.points < 2 or (self.drop is not None and self.drop < 0):
            raise RecipeError(f"points must be at least 2 and drop at least 0, got {self.points} and {self.drop}")
        check_positive(self, "bandwidth")

    def value(self, view: View) -> Tensor:
        """Minus the sum of entropies in nats, a scalar."""
        return -torch.stack([self.entropy(layer, len(view.images)).mean() for layer in view.attention]).sum()

    def entropy(self, layer: Attention, images: int) -> Tensor:
        """The entropy (N,) of one attention, whose windows lie image by image."""
        patches = layer.output[:, :, layer.prefix if self.drop is None else self.drop :].mean(1)  # (N * windows, P, d)
        patches = F.normalize(patches, dim=-1).unflatten(0, (images, -1))
        with torch.no_grad():
            similarity = patches @ patches.mT
            ends = similarity.aminmax()
        at = torch.linspace(float(ends.min), float(ends.max), self.points, device=patches.device, dtype=patches.dtype)
        return similarity_entropy(patches, at, self.bandwidth)


def similarity_entropy(patches: Tensor, at: Tensor, bandwidth: float) -> Tensor:
    """The entropy (N,) of the products of all pairs in the windows of ``patches`` (N, windows, P, d)."""
    entropy: Tensor = _SimilarityEntropy.apply(patches, at, bandwidth)  # type: ignore[no-untyped-call]  # autograd's functions are
    return entropy


class _SimilarityEntropy(torch.autograd.Function):
    """A few images at a time, so that the kernels of all pairs at all points stay in the cache, and each pair once."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, at: Tensor, bandwidth: float) -> Tensor:
        images, windows, count, _ = patches.shape
        rows, columns = torch.triu_indices(count, count, device=patches.device)
        pairs = rows * count + columns
        shares = torch.where(rows == columns, 1.0, 2.0).to(patches).repeat(windows) / (windows * count**2)
        entropies, gradient = patches.new_empty(images), torch.empty_like(patches)
        together = max(1, _CACHED // (len(at) * len(shares)))
        for part in map(slice, range(0, images, together), range(together, images + together, together)):
            x = patches[part]
            values = (x @ x.mT).flatten(2)[:, :, pairs].flatten(1)
            entropies[part], by_value = kernel_entropy(values, shares, at, bandwidth)
            by_product = x.new_zeros(len(x), windows, count**2)
            by_product[:, :, pairs] = by_value.unflatten(1, (windows, -1))
            by_product = by_product.unflatten(2, (count, count))
            gradient[part] = by_product @ x + by_product.mT @ x
        ctx.save_for_backward(gradient)
        return entropies

    @staticmethod
    def backward(ctx: Any, by_entropy: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * by_entropy[:, None, None, None], None, None


_CACHED = 200_000
"""How many kernels are computed at once: less than a megabyte."""


def kernel_entropy(
    values: Tensor, shares: Tensor, at: Tensor, bandwidth: float, floor: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """The differential entropy (N,) of ``values`` (N, M), which weigh ``shares`` (M,), and its gradient by them (N, M).

    Their density p is that of a Gaussian kernel k of width h, plus ``floor``, at equally spaced points ``at``; the
    entropy is the trapezoid rule of -p ln p. By a value s it changes by share * sum_t dH/dp(t) k(t - s) (t - s) / h^2.
    """
    peak = 1 / (math.sqrt(2 * math.pi) * bandwidth)
    widths = torch.full_like(at, float(at[-1] - at[0]) / (len(at) - 1))
    widths[[0, -1]] /= 2
    # below e^-60 nothing is left of a kernel, and numbers too small for their type make all that follows slow
    kernels = at[:, None] - values[:, None]  # (N, points, M)
    kernels = kernels.square_().mul_(-0.5 / bandwidth**2).clamp_(min=-60).exp_()
    density = peak * (kernels @ shares) + floor
    by_kernel = -widths * (density.log() + 1) * peak / bandwidth**2
    first, zeroth = (torch.stack([by_kernel * at, by_kernel], 1) @ kernels).unbind(1)
    return -(widths * density * density.log()).sum(1), (first - values * zeroth) * shares
