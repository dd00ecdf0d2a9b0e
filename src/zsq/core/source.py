"""Batch and Source: images that were made, over a finite set or a live stream alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zsq.core.errors import RecipeError

if TYPE_CHECKING:
    from zsq.core.method import Job, Synthesizer

__all__ = ["Batch", "Source"]


@dataclass(frozen=True)
class Batch:
    """Images (N, C, H, W) in the network's normalised input space, and their labels (N,) if they were made for some."""

    images: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | Tensor) -> Batch:
        return Batch(self.images[index], None if self.labels is None else self.labels[index])

    @staticmethod
    def join(batches: Sequence[Batch]) -> Batch:
        """One batch of all images in order; labels are kept if every batch has them."""
        labels = [batch.labels for batch in batches if batch.labels is not None]
        return Batch(
            torch.cat([batch.images for batch in batches]),
            torch.cat(labels) if len(labels) == len(batches) else None,
        )


class Source:
    """What a synthesizer makes, remembered, so that every pass sees the same images."""

    def __init__(self, synthesizer: Synthesizer, job: Job) -> None:
        self._job = job
        self._live = synthesizer.live
        self._stream = synthesizer.stream(job)
        self._made: list[Batch] = []
        self._joined: Batch | None = None

    def take(self, samples: int | None = None) -> Batch:
        """The first ``samples`` images made, or all of a finite set; fewer if the set is smaller.

        Raises:
            RecipeError: if a live stream is asked for all, or nothing was made.
        """
        if samples is None and self._live:
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
        if self._live:
            batch = self._next()
            if batch is None:
                raise RecipeError("the live synthesizer ended")
            return batch
        pool = self.take()
        size = min(size, len(pool))
        rounds, turn = divmod(step, len(pool) // size)
        order = torch.randperm(len(pool), generator=self._job.run.fresh(f"shuffle/{rounds}"))
        return pool[order[turn * size : (turn + 1) * size]]

    def batches(self, size: int, samples: int | None = None) -> Iterator[Batch]:
        """The first ``samples`` images in order, ``size`` at a time."""
        pool = self.take(samples)
        for start in range(0, len(pool), size):
            yield pool[start : start + size]

    def _next(self) -> Batch | None:
        # A consumer may run under no_grad; making images needs gradients all the same.
        with torch.enable_grad():
            return next(self._stream, None)
