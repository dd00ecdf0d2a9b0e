"""Losses that read class labels."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from zsq.core import Loss, View

__all__ = ["CrossEntropy"]


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Cross-entropy of the teacher's logits (N, K) with the labels (N,) the images were made for, mean over N."""

    needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    def value(self, view: View) -> Tensor:
        """The mean cross-entropy in nats."""
        return F.cross_entropy(view.logits, view.labels)
