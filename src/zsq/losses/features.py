"""Losses on what the teacher's classifier reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq.core import Batch, Job, Loss, MissingView, RecipeError, View

__all__ = ["CentreDistance", "class_centres"]


@dataclass(frozen=True, kw_only=True)
class CentreDistance(Loss):
    """Keep features within a ring around the centre of their class (marginal distance constraint of IntraQ).

    Mean over the images that have a centre of relu(lower - d) + relu(d - upper), with d = 1 - cos(f, c). A centre c is
    the mean feature of the earlier images of the class; without any there is nothing to keep to.
    """

    lower: float = 0.05
    """Cosine distance below which an image is too close to its centre."""
    upper: float = 0.8
    """Cosine distance above which it is too far."""

    needs: ClassVar[frozenset[str]] = frozenset({"features", "labels"})

    def __post_init__(self) -> None:
        if not 0 <= self.lower <= self.upper:
            raise RecipeError(f"lower and upper must be ordered and not negative, got {self.lower} and {self.upper}")

    def begin(self, job: Job) -> Callable[[View], Tensor]:
        """The term beside the images made so far."""
        if not job.made:
            return lambda view: view.logits.new_zeros(())
        earlier = Batch.join(job.made)
        if earlier.labels is None:
            raise MissingView("class centres need the labels of earlier images, and these were made for none")
        with torch.no_grad():
            looks = [job.teacher.view(earlier.images[i : i + 64], self.needs) for i in range(0, len(earlier), 64)]
        features = torch.cat([look.features for look in looks])
        centres, known = class_centres(features, earlier.labels, looks[0].logits.shape[1])
        return lambda view: self.distance(view.features, centres[view.labels], known[view.labels])

    def value(self, view: View) -> Tensor:
        """Nothing, without earlier images."""
        return view.logits.new_zeros(())

    def distance(self, features: Tensor, centres: Tensor, known: Tensor) -> Tensor:
        """The term for ``features`` and their ``centres`` (N, D); ``known`` (N,) says which centres there are."""
        d = 1 - F.cosine_similarity(features, centres, dim=1)
        outside = F.relu(self.lower - d) + F.relu(d - self.upper)
        return (outside * known).sum() / known.sum().clamp(min=1)


def class_centres(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The mean of the ``features`` (N, D) of each class (K, D), and which classes occur in ``labels`` (K,)."""
    counts = torch.bincount(labels, minlength=classes)
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    return sums / counts.clamp(min=1)[:, None], counts > 0
