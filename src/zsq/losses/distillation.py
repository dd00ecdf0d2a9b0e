"""Losses that compare the student with the teacher."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq.core import Loss, View, check_positive

__all__ = ["BranchEnergies", "CamAlignment", "Distillation", "grad_cam"]


@dataclass(frozen=True, kw_only=True)
class Distillation(Loss):
    """Temperature-scaled KL divergence from teacher to student, T^2 * KL(softmax(t/T) || softmax(s/T)).

    ``weight`` is the papers' alpha, so that alpha * T^2 stands before the divergence: 20 * 20^2 = 8000 in IntraQ,
    HAST and SynQ.
    """

    temperature: float = 20.0
    """Softening T of both distributions; 1 is plain KL."""
    reduction: Literal["batchmean", "mean"] = "batchmean"
    """The equation, or divided by the number of classes too, as the GDFQ family's code does."""

    needs: ClassVar[frozenset[str]] = frozenset({"student"})

    def __post_init__(self) -> None:
        check_positive(self, "temperature")

    def value(self, view: View) -> Tensor:
        """The divergence in nats, times T^2."""
        t = self.temperature
        student, teacher = F.log_softmax(view.student / t, 1), F.log_softmax(view.logits / t, 1)  # (N, K)
        shares = student.shape[1] if self.reduction == "mean" else 1
        return t * t / shares * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@dataclass(frozen=True, kw_only=True)
class BranchEnergies(Loss):
    """Distance of the channel energies at the end of every residual branch (feature alignment of HAST).

    sum over branches of the mean over (N, C) of (a_s - a_t)^2, with a = e / |e| and e_c the mean over (H, W) of x_c^2.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"branches", "student"})

    def value(self, view: View) -> Tensor:
        """The sum of the distances."""
        pairs = zip(*view.branches, strict=True)
        return torch.stack([F.mse_loss(_energies(s), _energies(t)) for t, s in pairs]).sum()


@dataclass(frozen=True, kw_only=True)
class CamAlignment(Loss):
    """Mean squared difference of the class activation maps of teacher and student, each of its own best class."""

    needs: ClassVar[frozenset[str]] = frozenset({"maps", "student"})

    def value(self, view: View) -> Tensor:
        """The difference, between 0 and 1."""
        size = view.images.shape[2:]
        teacher, student = view.maps
        wanted = grad_cam(view.logits, teacher, size).detach()
        return F.mse_loss(grad_cam(view.student, student, size), wanted)


def grad_cam(logits: Tensor, maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Where in ``maps`` (N, C, h, w) each image's best logit of ``logits`` (N, K) comes from: (N, *size), in 0..1.

    relu(sum_c a_c A_c), upsampled, its least value moved to 0 and its largest to 1; a_c is the mean over (h, w) of the
    gradient of the logit by the map, and channels that speak against the class (a_c < 0) are left out. The weights a
    are constants, so gradients reach what made the map, and nothing behind it.
    """
    (slope,) = torch.autograd.grad(logits.amax(1).sum(), maps, retain_graph=True)
    weights = _precise(slope).mean((2, 3), keepdim=True).clamp(min=1e-10)
    cam = F.relu((weights * _precise(maps)).sum(1, keepdim=True))
    cam = F.interpolate(cam, list(size), mode="bilinear", align_corners=False)[:, 0]
    cam = cam - cam.amin((1, 2), keepdim=True)
    shown: Tensor = cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-10)
    return shown


def _precise(x: Tensor) -> Tensor:
    """``x`` in float32 at least, whatever its layer computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _energies(x: Tensor) -> Tensor:
    return F.normalize(_precise(x).square().flatten(2).mean(2), dim=1)
