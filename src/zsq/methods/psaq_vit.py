"""PSAQ-ViT (Li et al., ECCV 2022, arXiv 2203.02250): images whose patches differ as a photograph's do, then ranges.

Follows the released code: patches are compared by what they read in each attention, before heads are joined. It
always drops the first token, which in a Swin window is a patch; here only tokens that are no patches are dropped
(preset ``released`` drops the first everywhere). Its target of the total variation holds for 32 images of 224 pixels
and is scaled for others, as are its shifts of 15 and 30 pixels. Pixels are clamped by the network's own mean and
standard deviation. The preset ``swin`` has the learning rate of Swin.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq.core import Attention, Loss, Method, Paper, RecipeError, View, check_positive
from zsq.losses import CrossEntropy, TotalVariation
from zsq.quant import SIMULATE_ALL, Calibrate, InsertFakeQuant
from zsq.synthesis import InTurn, OptimizeImages, ShiftAndFlip, UniformLabels, WarmUpCosine

PROTOCOL = SIMULATE_ALL


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


def similarity_entropy(patches: Tensor, at: Tensor, bandwidth: float, floor: float = 1e-4) -> Tensor:
    """The entropy (N,) of the products of all pairs in ``patches`` (N, windows, P, d), from its density at ``at``."""
    entropy: Tensor = _SimilarityEntropy.apply(patches, at, bandwidth, floor)  # type: ignore[no-untyped-call]  # autograd's functions are
    return entropy


class _SimilarityEntropy(torch.autograd.Function):
    """One image at a time, so that the kernels of all pairs at all points stay in the cache, and each pair once.

    The gradient is found on the way, while the kernels are there: by a similarity s of n in all it is
    sum_t H'(p_t) (t - s) k(t - s) / (n h^2), k being the kernel.
    """

    @staticmethod
    def forward(ctx: Any, patches: Tensor, at: Tensor, bandwidth: float, floor: float) -> Tensor:
        images, windows, count, _ = patches.shape
        rows, columns = torch.triu_indices(count, count, device=patches.device)
        pairs = rows * count + columns
        share = torch.where(rows == columns, 1.0, 2.0).to(patches).repeat(windows) / (windows * count**2)
        peak = 1 / (math.sqrt(2 * math.pi) * bandwidth)
        widths = torch.full_like(at, float(at[-1] - at[0]) / (len(at) - 1))
        widths[[0, -1]] /= 2
        similarity = (patches @ patches.mT).flatten(2)
        slopes = torch.zeros_like(similarity)
        entropies = patches.new_empty(images)
        for index in range(images):
            s = similarity[index][:, pairs].flatten()
            # below e^-80 nothing is left of a kernel, and exp itself is slow
            kernels = (at[:, None] - s).square_().mul_(-0.5 / bandwidth**2).clamp_(min=-80).exp_()  # (points, pairs)
            density = peak * (kernels @ share) + floor
            entropies[index] = -(widths * density * density.log()).sum()
            by_kernel = -widths * (density.log() + 1) * peak / bandwidth**2
            first, zeroth = torch.stack([by_kernel * at, by_kernel]) @ kernels
            slopes[index][:, pairs] = ((first - s * zeroth) * share).unflatten(0, (windows, -1))
        ctx.save_for_backward(patches, slopes.view(images, windows, count, count))
        return entropies

    @staticmethod
    def backward(ctx: Any, by_entropy: Tensor) -> tuple[Tensor | None, ...]:
        patches, slopes = ctx.saved_tensors
        slopes = slopes * by_entropy[:, None, None, None]
        return (slopes + slopes.mT) @ patches, None, None, None


PSAQ_VIT = Method(
    name="psaq-vit",
    paper=Paper(
        title="Patch Similarity Aware Data-Free Quantization for Vision Transformers",
        venue="ECCV 2022",
        arxiv="2203.02250",
    ),
    synthesizer=OptimizeImages(
        loss=PatchSimilarityEntropy() + CrossEntropy() + 0.05 * TotalVariation(target=(2_500.0, 3_000.0)),
        labels=UniformLabels(),
        jitter=InTurn(
            first=ShiftAndFlip(limit=15 / 224, diagonal=True),
            second=ShiftAndFlip(limit=30 / 224, diagonal=True),
        ),
        samples=32,
        batch_size=32,
        steps=1_000,
        lr=0.2,
        betas=(0.5, 0.9),
        schedule=WarmUpCosine(rounds=2, warm_up=0.2),
        clamp=True,
    ),
    quantizer=(InsertFakeQuant(protocol=PROTOCOL), Calibrate(samples=32, batch_size=32)),
    presets={
        "released": {"synthesizer.loss.patch_similarity_entropy.drop": 1},
        "swin": {"synthesizer.lr": 0.25},
        "fast": {"synthesizer.steps": 200},
    },
)
