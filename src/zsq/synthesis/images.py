"""Images by descent in pixels, and images that are plain noise."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap
from typing import Any, ClassVar, NotRequired, Protocol, TypedDict

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from zsq.core import (
    Batch,
    Job,
    Loss,
    Objective,
    Recipe,
    RecipeError,
    Transform,
    View,
    check_counts,
    check_positive,
    needs,
    start,
    walk,
)
from zsq.synthesis.sampling import GaussianPixels, InTurn, ShiftAndFlip, UniformLabels

__all__ = [
    "Noise",
    "OptimizeImages",
    "Patches",
    "Piece",
    "PixelInit",
    "Plateau",
    "Sight",
    "WarmUpCosine",
    "batch_sizes",
    "kept",
    "made",
]


class PixelInit(Protocol):
    """Where the pixels of a batch start."""

    def draw(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Pixels of ``shape`` (N, C, H, W) in normalised space."""


class Piece(TypedDict):
    """A batch as it is kept: ``labels`` is empty when the images were made for none; tokens only where some are."""

    images: Tensor
    labels: Tensor
    tokens: NotRequired[Tensor]


class Sight(Protocol):
    """How a teacher looks at the pixels of one batch, step after step."""

    def view(self, step: int, pixels: Tensor, jitter: Transform | None, needs: frozenset[str], **more: Any) -> View:
        """What it sees of ``pixels`` (N, C, H, W) at ``step``; ``more`` is passed on to the view."""

    def made(self, pixels: Tensor) -> Batch:
        """The batch when the steps are done."""


class Patches(Protocol):
    """A rule that says which patches of images are looked at while they are made."""

    def begin(self, job: Job, count: int, rng: torch.Generator) -> Sight:
        """The looks at one batch of ``count`` images, which draw their moves from ``rng``."""


@dataclass(frozen=True)
class AllPatches:
    """The whole image at every step, moved by the jitter."""

    job: Job
    rng: torch.Generator

    def view(self, step: int, pixels: Tensor, jitter: Transform | None, needs: frozenset[str], **more: Any) -> View:
        """What the teacher sees of ``pixels`` (N, C, H, W)."""
        moved = jitter.move(pixels, self.rng) if jitter else pixels
        return self.job.teacher.view(moved, needs, pixels=pixels, **more)

    def made(self, pixels: Tensor) -> Batch:
        """The pixels as they are."""
        return Batch(pixels)


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

    def build(self, optimizer: Optimizer, steps: int) -> Callable[[float], None]:
        """The schedule: to be called after each step with its loss, however many there are."""
        return ReduceLROnPlateau(optimizer, factor=self.factor, patience=self.patience, min_lr=self.min_lr).step


@dataclass(frozen=True, kw_only=True)
class WarmUpCosine(Recipe):
    """In each of equal rounds raise the learning rate linearly, then lower it to 0 along a cosine.

    Step i of a round of n with w steps of warm-up has the factor (i + 1) / w, then (1 + cos(pi (i - w) / (n - w))) / 2.
    Only the rate starts anew with a round; the moments of the optimizer stay.
    """

    rounds: int = 2
    warm_up: float = 0.2
    """The share of a round in which the rate rises."""

    def __post_init__(self) -> None:
        check_counts(self, "rounds")
        if not 0 <= self.warm_up < 1:
            raise RecipeError(f"warm_up must lie in [0, 1), got {self.warm_up}")

    def build(self, optimizer: Optimizer, steps: int) -> Callable[[float], None]:
        """The schedule of ``steps`` steps: to be called after each one, with its loss."""
        length = -(-steps // self.rounds)
        rising = round(self.warm_up * length)

        def factor(step: int) -> float:
            turn = step % length
            falling = (turn - rising) / (length - rising)
            return (turn + 1) / rising if turn < rising else (1 + math.cos(math.pi * falling)) / 2

        schedule = LambdaLR(optimizer, factor)
        return lambda loss: schedule.step()


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
    jitter: Transform | InTurn | None = None
    """How an image is moved before each look."""
    patches: Patches | None = None
    """Which patches of the images are looked at, step after step; None is all, always."""
    samples: int = 64
    """Images in all."""
    batch_size: int = 64
    """Images that are optimised together."""
    steps: int = 500
    """Adam steps a batch."""
    lr: float = 0.5
    """Learning rate of the pixels, in units of normalised space."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moments."""
    schedule: Plateau | WarmUpCosine | None = Plateau()
    clamp: bool = False
    """Keep each channel of the pixels, after each step, within what an image file can hold."""

    live: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(self, "samples", "batch_size", "steps")
        check_positive(self, "lr")
        if self.labels is None and "labels" in needs(self.loss):
            raise RecipeError("the loss reads labels: say for which classes images are made, as labels=UniformLabels()")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"betas must lie in [0, 1), got {self.betas}")
        jitters = self.jitter.parts().values() if isinstance(self.jitter, InTurn) else [self.jitter]
        if self.patches and not all(isinstance(each, ShiftAndFlip | None) for each in jitters):
            raise RecipeError("patches can be followed through a ShiftAndFlip alone: choose it as the jitter, or None")

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
        optimizer = Adam([pixels], lr=self.lr, betas=self.betas)
        slow = self.schedule.build(optimizer, self.steps) if self.schedule else None
        objective, seen = start(self.loss, job), needs(self.loss)
        sight = self.patches.begin(job, size, rng) if self.patches else AllPatches(job, rng)
        low, high = torch.tensor(job.pixel_box).T[:, None, :, None, None].to(pixels)
        for step in job.run.progress(self.steps, "synthesize"):
            jitter = self.jitter.at(step / self.steps) if isinstance(self.jitter, InTurn) else self.jitter
            loss = objective(sight.view(step, pixels, jitter, seen, labels=labels))
            objective.check("synthesize", step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if self.clamp:
                pixels.data.clamp_(low, high)
            if slow:
                slow(loss.item())
            if step % 100 == 0 or step + 1 == self.steps:
                job.run.log("synthesize", step, **objective.numbers(), loss=loss.item())
        return kept(replace(sight.made(pixels.detach()), labels=labels))


def batch_sizes(samples: int, batch_size: int) -> list[int]:
    """``samples`` split into batches; only the last may be smaller.

    >>> batch_sizes(10, 4)
    [4, 4, 2]
    """
    return [min(batch_size, samples - first) for first in range(0, samples, batch_size)]


def kept(batch: Batch) -> Piece:
    """A batch as it is kept."""
    piece: Piece = {
        "images": batch.images,
        "labels": torch.empty(0) if batch.labels is None else batch.labels,
    }
    if batch.tokens is not None:
        piece["tokens"] = batch.tokens
    return piece


def made(piece: Piece) -> Batch:
    """A kept piece as the batch that passes see."""
    return Batch(piece["images"], piece["labels"] if len(piece["labels"]) else None, tokens=piece.get("tokens"))
