"""Images that the teacher takes for each class, from barely to surely, for a few looks of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from zsq.core import Batch, Job, Recipe, Synthesizer, check_counts, check_positive
from zsq.synthesis.images import Piece, kept, made
from zsq.synthesis.sampling import UniformLabels

__all__ = ["ReachMargins", "margins"]


@dataclass(frozen=True, kw_only=True)
class ReachMargins(Recipe):
    """Move images along the gradient until a class leads by as much as was drawn for each.

    The lead is the logit of the class less the largest other one. What is drawn is uniform from 0 to ``lead``, so that
    a set has images at all distances from a decision, as photographs have. A step is as long as would reach the drawn
    lead if the network were linear; an image that is there moves no more.
    """

    start: Synthesizer
    """What makes the images that are moved."""
    labels: UniformLabels = UniformLabels()
    steps: int = 6
    """Looks of the teacher, at most; it takes fewer if all images are there."""
    lead: float = 12.0
    """The largest lead drawn, in logits."""

    live: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    def __post_init__(self) -> None:
        check_counts(self, "steps")
        check_positive(self, "lead")

    def stream(self, job: Job) -> Iterator[Batch]:
        """The batches of the start, each moved on its own."""
        for index, batch in enumerate(self.start.stream(job)):
            yield made(job.run.cached(f"margins/{index}", partial(self._reach, batch.images, job)))

    def _reach(self, pixels: Tensor, job: Job) -> Piece:
        rng, device = job.run.generator("margins"), job.run.device
        labels = self.labels.draw(len(pixels), job.classes, rng).to(device)
        wanted = (self.lead * torch.rand(len(pixels), generator=rng)).to(device)
        low, high = torch.tensor(job.pixel_box, device=device).T[:, None, :, None, None]
        span = (high - low).square()  # a step is measured in what an image file holds, not in normalised space
        pixels = pixels.detach().clamp(low, high)
        for _ in job.run.progress(self.steps, "synthesize"):
            found = margins(job.teacher.view(pixels.requires_grad_()).logits, labels)
            missing = (wanted - found.detach()).clamp(min=0)
            if not missing.any():
                break
            (slope,) = torch.autograd.grad(found.sum(), pixels)
            gain = (span * slope.square()).sum((1, 2, 3))  # of the lead, for a step of span * slope
            length = missing / gain.clamp(min=1e-12)  # where no direction helps, nothing moves
            pixels = (pixels.detach() + length.view(-1, 1, 1, 1) * span * slope).clamp(low, high)
        return kept(Batch(pixels.detach(), labels))


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the logit of each label (N,) leads over the largest other one of ``logits`` (N, K); negative behind.

    >>> margins(torch.tensor([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5]]), torch.tensor([0, 1])).tolist()
    [0.5, -2.0]
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], float("-inf")).amax(1)
    return own - others
