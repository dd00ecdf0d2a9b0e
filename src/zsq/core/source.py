"""Batch and Source: images that were made, over a finite set or a live stream alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zsq.core.errors import RecipeError

if TYPE_CHECKING:
    from zsq.core.method import Job, Synthesizer

__all__ = ["Batch", "Source"]


@dataclass(frozen=True)
class Batch:
    """Images (N, C, H, W) in the network's normalised input space."""

    images: Tensor
    labels: Tensor | None = None
    """The classes they were made for: indices (N,) or shares (N, K); None if they were made for none."""
    logits: Tensor | None = None
    """The teacher's logits (N, K) on them, where they are known."""
    tokens: Tensor | None = None
    """Which tokens of each image a transformer is to see, indices (N, k); None is all. Others may be blank."""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | Tensor) -> Batch:
        rest = (None if each is None else each[index] for each in (self.labels, self.logits, self.tokens))
        return Batch(self.images[index], *rest)

    @staticmethod
    def join(batches: Sequence[Batch]) -> Batch:
        """One batch of all images in order; what else is known is kept if every batch knows it, and of one kind.

        Raises:
            RecipeError: if the images of one batch are to be seen by more tokens than those of another.
        """

        def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
            present = [part for part in parts if part is not None]
            alike = len(present) == len(parts) and len({part.dim() for part in present}) == 1
            return torch.cat(present) if alike else None

        if len({None if b.tokens is None else b.tokens.shape[1] for b in batches}) > 1:
            raise RecipeError("batches of which each image keeps another number of tokens cannot be joined")
        images = torch.cat([batch.images for batch in batches])
        known = [[getattr(b, name) for b in batches] for name in ("labels", "logits", "tokens")]
        return Batch(images, *map(joined, known))


class Source:
    """What a synthesizer makes, remembered, so that every pass sees the same images."""

    def __init__(self, synthesizer: Synthesizer, job: Job, name: str = "") -> None:
        """``name`` keeps apart what two sources of one run draw and track; the run's own has none."""
        self._job, self._name = job, name
        self.live = synthesizer.live
        self._stream = synthesizer.stream(job)
        self._made: list[Batch] = []
        self._joined: Batch | None = None

    def take(self, samples: int | None = None) -> Batch:
        """The first ``samples`` images made, or all of a finite set; fewer if the set is smaller.

        Raises:
            RecipeError: if a live stream is asked for all, or nothing was made.
        """
        if samples is None and self.live:
            raise RecipeError("a live synthesizer makes images without end: say how many to take")
        while samples is None or sum(map(len, self._made)) < samples:
            batch = self._next()
            if batch is None:
                break
            self._made.append(batch)
            self._joined = None
        if not self._made:
            raise RecipeError("the synthesizer made no images")
        if self._joined is None:
            self._joined = Batch.join(self._made)
        return self._joined[:samples]

    def batch(self, step: int, size: int) -> Batch:
        """The batch of a training step: that turn of reshuffled rounds over a finite set, or the next of a live stream.

        The order of a round is a function of (seed, round) alone, so a resumed loop sees the same batches.
        """
        if self.live:
            batch = self._next()
            if batch is None:
                raise RecipeError("the live synthesizer ended")
            return batch
        pool = self.take()
        if size > len(pool):
            raise RecipeError(f"a batch of {size} is larger than the set of {len(pool)} images")
        rounds, turn = divmod(step, len(pool) // size)
        with self._job.run.named(self._name):
            order = torch.randperm(len(pool), generator=self._job.run.fresh(f"shuffle/{rounds}"))
        return pool[order[turn * size : (turn + 1) * size]]

    def batches(self, size: int, samples: int | None = None) -> Iterator[Batch]:
        """The first ``samples`` images in order, ``size`` at a time."""
        pool = self.take(samples)
        for start in range(0, len(pool), size):
            yield pool[start : start + size]

    def tell_logits(self, size: int = 256) -> None:
        """Let the teacher judge every image of a finite set once, so that no later look needs it."""
        pool = self.take()
        if pool.logits is None:
            parts = [pool[i : i + size] for i in range(0, len(pool), size)]
            with torch.no_grad(), self._job.run.autocast():
                logits = [self._job.teacher.view(part.images, tokens=part.tokens).logits for part in parts]
            self._joined = replace(pool, logits=torch.cat(logits))

    def _next(self) -> Batch | None:
        # A consumer may run under no_grad; making images needs gradients all the same.
        with torch.enable_grad(), self._job.run.named(self._name):
            return next(self._stream, None)
