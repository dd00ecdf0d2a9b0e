"""Losses that read class labels. Labels are indices (N,), below 0 where none is believed, or shares (N, K)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq.core import Loss, Recipe, RecipeError, View

__all__ = ["CrossEntropy", "EasyLabels", "HardCrossEntropy", "StudentCrossEntropy"]


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Cross-entropy of the teacher's logits (N, K) with the labels the images were made for, mean over N."""

    needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    def value(self, view: View) -> Tensor:
        """The mean cross-entropy in nats."""
        return _cross_entropy(view.logits, view.labels)


@dataclass(frozen=True, kw_only=True)
class StudentCrossEntropy(Loss):
    """Cross-entropy of the student's logits (N, K) with the labels, the sum over N divided by N.

    An image whose label is not believed adds nothing to the sum, but counts in N.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"labels", "student"})

    def value(self, view: View) -> Tensor:
        """The mean cross-entropy in nats."""
        return _cross_entropy(view.student, view.labels)


@dataclass(frozen=True, kw_only=True)
class HardCrossEntropy(Loss):
    """Cross-entropy of the teacher weighted by difficulty: mean of (1 - p)^focus * (-log p), p that of the label.

    The gradient flows through the weight too (HAST, Li et al. 2023).
    """

    focus: float = 2.0
    """Exponent; 0 is the plain cross-entropy."""

    needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    def __post_init__(self) -> None:
        if not self.focus >= 0:
            raise RecipeError(f"focus cannot be negative, got {self.focus}")

    def value(self, view: View) -> Tensor:
        """The weighted mean in nats."""
        log_p = F.log_softmax(view.logits, 1).gather(1, view.labels[:, None])[:, 0]
        # 1 - p as -expm1(log p), kept off zero: the power below 1 of a zero has no gradient
        difficulty = (-torch.expm1(log_p)).clamp(min=1e-12)
        return -(difficulty**self.focus * log_p).mean()


@dataclass(frozen=True, kw_only=True)
class EasyLabels(Recipe):
    """Believe a label where the teacher gives it a probability above 1 - ``threshold`` (SynQ, Kim et al. 2025).

    Images that were made for no label are taken to be what the teacher sees in them.
    """

    threshold: float = 0.5
    """Difficulty 1 - p below which an image is easy; 1 believes all."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise RecipeError(f"threshold must lie in [0, 1], got {self.threshold}")

    def believed(self, view: View) -> Tensor:
        """The labels (N,), -1 where none is believed."""
        labels = view.labels if view.labelled else view.logits.argmax(1)
        if labels.dim() == 2:
            labels = labels.argmax(1)
        p = view.logits.detach().softmax(1).gather(1, labels[:, None])[:, 0]
        return torch.where(p > 1 - self.threshold, labels, -1)  # 1 - p would lose what is left of a small p


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.dim() == 2:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels.clamp(min=-1), ignore_index=-1, reduction="sum") / len(logits)
