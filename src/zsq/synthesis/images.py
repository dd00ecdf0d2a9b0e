"""Images by descent in pixels, and images that are plain noise."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from typing import ClassVar, Protocol, TypedDict

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from zsq.core import (
    Batch,
    Job,
    Loss,
    Objective,
    Recipe,
    RecipeError,
    Transform,
    check_counts,
    check_positive,
    needs,
    start,
    walk,
)
from zsq.synthesis.sampling import GaussianPixels, UniformLabels

__all__ = ["Noise", "OptimizeImages", "Piece", "PixelInit", "Plateau", "batch_sizes", "made"]


class PixelInit(Protocol):
    """Where the pixels of a batch start."""

    def draw(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Pixels of ``shape`` (N, C, H, W) in normalised space."""


class Piece(TypedDict):
    """A batch as it is kept: ``labels`` is empty when the images were made for none."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Plateau(Recipe):
    """Multiply the learning rate by ``factor`` when the loss has not improved for ``patience`` steps."""

    factor: float = 0.1
    patience: int = 100
    min_lr: float = 1e-4

    def __post_init__(self) -> None:
        if self.patience < 0 or not self.min_lr >= 0:
            raise RecipeError(f"patience and min_lr cannot be negative, got {self.patience} and {self.min_lr}")
        if not 0 < self.factor < 1:
            raise RecipeError(f"factor must lie between 0 and 1, got {self.factor}")

    def build(self, optimizer: Optimizer) -> ReduceLROnPlateau:
        """The schedule; its ``step`` takes the loss."""
        return ReduceLROnPlateau(optimizer, factor=self.factor, patience=self.patience, min_lr=self.min_lr)


@dataclass(frozen=True, kw_only=True)
class Noise(Recipe):
    """Images that nobody optimised: what a method must beat."""

    pixels: PixelInit = GaussianPixels()
    samples: int = 256

    live: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(self, "samples")

    def stream(self, job: Job) -> Iterator[Batch]:
        """One batch of all samples."""
        pixels = self.pixels.draw((self.samples, *job.input_shape), job.run.fresh("noise"))
        yield Batch(pixels.to(job.run.device))


@dataclass(frozen=True, kw_only=True)
class OptimizeImages(Recipe):
    """Descend an objective in the pixels of a batch with Adam; the last iterate is kept."""

    loss: Loss | Objective
    pixels: PixelInit = GaussianPixels()
    labels: UniformLabels | None = None
    """Classes the images are made for; None for objectives that read none."""
    jitter: Transform | None = None
    """How an image is moved before each look."""
    samples: int = 64
    """Images in all."""
    batch_size: int = 64
    """Images that are optimised together."""
    steps: int = 500
    """Adam steps a batch."""
    lr: float = 0.5
    """Learning rate of the pixels, in units of normalised space."""
    schedule: Plateau | None = Plateau()

    live: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(self, "samples", "batch_size", "steps")
        check_positive(self, "lr")
        if self.labels is None and "labels" in needs(self.loss):
            raise RecipeError("the loss reads labels: say for which classes images are made, as labels=UniformLabels()")

    def stream(self, job: Job) -> Iterator[Batch]:
        """The batches, each a piece of work of its own."""
        sizes = enumerate(batch_sizes(self.samples, self.batch_size))
        makes = {f"images/{index}": partial(self._optimize, size, job) for index, size in sizes}
        for piece in starmap(job.run.cached, makes.items()) if self._looks_back else job.run.pieces(makes):
            batch = made(piece)
            job.made.append(batch)
            yield batch

    @property
    def _looks_back(self) -> bool:
        """Whether a term may remember earlier batches."""
        return any(isinstance(term, Loss) and type(term).begin is not Loss.begin for term in walk(self.loss))

    def _optimize(self, size: int, job: Job) -> Piece:
        rng = job.run.generator("images")
        labels = None
        if self.labels is not None:
            labels = self.labels.draw(size, job.classes, rng).to(job.run.device)
        pixels = self.pixels.draw((size, *job.input_shape), rng).to(job.run.device).requires_grad_()
        optimizer = Adam([pixels], lr=self.lr)
        schedule = self.schedule.build(optimizer) if self.schedule else None
        objective, seen = start(self.loss, job), needs(self.loss)
        look: Callable[[Tensor], Tensor] = partial(self.jitter.move, rng=rng) if self.jitter else (lambda x: x)
        for step in job.run.progress(self.steps, "synthesize"):
            loss = objective(job.teacher.view(look(pixels), seen, labels=labels))
            objective.check("synthesize", step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule:
                schedule.step(loss.item())
            if step % 100 == 0 or step + 1 == self.steps:
                job.run.log("synthesize", step, loss=loss.item())
        return {"images": pixels.detach(), "labels": torch.empty(0) if labels is None else labels}


def batch_sizes(samples: int, batch_size: int) -> list[int]:
    """``samples`` split into batches; only the last may be smaller.

    >>> batch_sizes(10, 4)
    [4, 4, 2]
    """
    return [min(batch_size, samples - first) for first in range(0, samples, batch_size)]


def made(piece: Piece) -> Batch:
    """A kept piece as the batch that passes see."""
    return Batch(piece["images"], piece["labels"] if len(piece["labels"]) else None)
