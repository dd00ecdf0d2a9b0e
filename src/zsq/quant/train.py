"""Passes that train a student: ranges that settle first, then distillation from the teacher."""

from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer

from zsq.core import (
    Batch,
    Job,
    Loss,
    MultiStep,
    Objective,
    Recipe,
    RecipeError,
    Source,
    Synthesizer,
    Total,
    Transform,
    View,
    check_counts,
    check_positive,
    look,
    needs,
    start,
)
from zsq.quant.grid import MinMax, Range, RangeAverage
from zsq.quant.quantizers import (
    ActivationQuantizer,
    WeightQuantizer,
    activation_quantizers,
    float_weight,
    weight_quantizers,
)

__all__ = [
    "Descender",
    "Descent",
    "Distill",
    "Gradient",
    "LabelFilter",
    "Nesterov",
    "Once",
    "Perturbed",
    "TrackRanges",
    "WarmUp",
]


@dataclass(frozen=True, kw_only=True)
class TrackRanges(Recipe):
    """Set activation ranges to a moving average over batches, then freeze them; nothing else of the student changes."""

    range: Range = MinMax()
    """How the range of one batch is found."""
    average: RangeAverage = RangeAverage()
    steps: int = 800
    batch_size: int = 16
    """Images a batch, or the first so many of a larger one; extremes of small batches leave outliers out."""
    images: Synthesizer | None = None
    """Makes the images to look at; None for those of the method itself."""

    reads_images: ClassVar[bool] = True
    draws_batches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self, "steps", "batch_size")

    def check(self) -> None:
        """Return if the average can settle.

        Raises:
            RecipeError: if its correction is fed back and there are fewer than 200 steps.
        """
        if self.average.correction == "fed back" and self.steps < 200:
            raise RecipeError(f"ranges whose correction is fed back take 200 steps to settle, got {self.steps}")

    def apply(self, job: Job, source: Source) -> None:
        """Change ``job.student`` in place."""
        if self.images is not None:
            source = Source(self.images, job, name="ranges")
        quantizers = activation_quantizers(job.student)
        for quantizer in quantizers.values():
            quantizer.observe(self.range, self.average)
        job.run.track("ranges", _Ranges(quantizers))
        for step in job.run.steps(self.steps, "track ranges"):
            batch = source.batch(step, self.batch_size)
            with torch.no_grad(), job.run.autocast():
                part = batch[: self.batch_size]
                look(job.student, part.images, frozenset(), job.teacher.landmarks, part.tokens)
        for quantizer in quantizers.values():
            quantizer.observe(None)


@dataclass(frozen=True, kw_only=True)
class WarmUp(Recipe):
    """Draw batches from a live synthesizer, so that it learns for a while before the student does."""

    steps: int
    """0 where the student starts at once."""

    reads_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise RecipeError(f"steps cannot be negative, got {self.steps}")

    def apply(self, job: Job, source: Source) -> None:
        """Change nothing but the synthesizer."""
        for step in job.run.steps(self.steps, "warm up"):
            source.batch(step, 1)


class Descent(Protocol):
    """How a gradient becomes a step."""

    def build(self, student: nn.Module, lr: float) -> Optimizer:
        """An optimizer of every parameter of ``student`` that requires a gradient."""


@dataclass(frozen=True, kw_only=True)
class Nesterov(Recipe):
    """Stochastic gradient descent with Nesterov momentum."""

    momentum: float = 0.9
    weight_decay: float = 1e-4
    """On every parameter."""

    def __post_init__(self) -> None:
        if not (0 <= self.momentum < 1 and self.weight_decay >= 0):
            raise RecipeError(f"momentum must lie in [0, 1) and weight_decay not be negative, got {self}")

    def build(self, student: nn.Module, lr: float) -> Optimizer:
        """The optimizer."""
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        return SGD(parameters, lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.momentum > 0)


class LabelFilter(Protocol):
    """A rule that says which labels of a batch are believed."""

    def believed(self, view: View) -> Tensor:
        """The labels (N,), below 0 where none is believed."""


class Gradient(Protocol):
    """How the gradients of one batch are found."""

    def build(self, job: Job, loss: Loss | Objective, labels: LabelFilter | None) -> "Descender":
        """A function that finds them, with the memory of one training."""


class Descender(Protocol):
    """Adds the gradients of a batch to the student's parameters."""

    totals: tuple[Total, ...]
    """The sums whose gradients they are."""

    def __call__(self, batch: Batch) -> Tensor:
        """The value of the loss, a scalar without gradient."""


@dataclass(frozen=True, kw_only=True)
class Once(Recipe):
    """From one look at the batch."""

    def build(self, job: Job, loss: Loss | Objective, labels: LabelFilter | None) -> Descender:
        """The function."""
        return _Once(job, loss, labels)


@dataclass(frozen=True, kw_only=True)
class Perturbed(Recipe):
    """From two looks: at the batch, and at the batch moved to where the student does worse (HAST, Li et al. 2023).

    x' = x + epsilon * sign(d loss(x) / dx), then loss(x) + weight * moved(x') + beside(x). Both networks are
    differentiated for the direction. A label is believed for x' where it is for x.
    """

    epsilon: float = 0.01
    """Size of the move in normalised space, the same for every pixel."""
    moved: Loss | Objective | None = None
    """The loss at x'; None for the same as at x."""
    weight: float = 1.0
    """Coefficient of the loss at x'."""
    beside: Loss | Objective | None = None
    """Terms at x that have no say in the direction."""

    def __post_init__(self) -> None:
        if not (self.epsilon >= 0 and self.weight >= 0):
            raise RecipeError(f"epsilon and weight cannot be negative, got {self.epsilon} and {self.weight}")

    def build(self, job: Job, loss: Loss | Objective, labels: LabelFilter | None) -> Descender:
        """The function."""
        return _Perturbed(self, job, loss, labels)


@dataclass(frozen=True, kw_only=True)
class Distill(Recipe):
    """Train the weights, biases and BatchNorm parameters of the student with the teacher as target; keep the last step.

    Activation ranges are those found before; running statistics stay the teacher's, unless ``student_bn`` is "train".
    """

    loss: Loss | Objective
    """Each term a mean over the images, so that ranks can share a batch."""
    transforms: tuple[Transform, ...] = ()
    """What is done to the images before both networks look at them, in order."""
    labels: LabelFilter | None = None
    """Which labels are believed; None for all."""
    gradient: Gradient = Once()
    optimizer: Descent = Nesterov()
    lr: float = 1e-4
    """Learning rate."""
    schedule: MultiStep = MultiStep()
    steps: int = 10_000
    batch_size: int = 64
    """Images a step; a live synthesizer says itself how many it makes."""
    straight_through: Literal["all", "inside"] = "all"
    """Which activations a gradient reaches through their rounding: all, or those inside the range."""
    student_bn: Literal["eval", "train"] = "eval"
    """Whether BatchNorm normalizes by its running statistics, which stay, or by those of the batch."""

    trains: ClassVar[bool] = True
    reads_images: ClassVar[bool] = True
    draws_batches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self, "steps", "batch_size")
        check_positive(self, "lr")

    def apply(self, job: Job, source: Source) -> None:
        """Change ``job.student`` in place."""
        run, student = job.run, job.student
        _let_learn(student, self.straight_through, self.student_bn)
        optimizer = self.optimizer.build(student, self.lr)
        schedule = self.schedule.build(optimizer)
        for name, thing in (("student", student), ("optimizer", optimizer), ("schedule", schedule)):
            run.track(f"distill/{name}", thing)
        if not source.live and not self.transforms:
            source.tell_logits()
        descend = self.gradient.build(job, self.loss, self.labels)
        for step in run.steps(self.steps, "distill"):
            batch = self._moved(source.batch(step, self.batch_size), run.fresh(f"transforms/{step}"))
            optimizer.zero_grad()
            value = descend(batch[run.share(len(batch))])
            run.average(student, value)
            if step % 100 == 0 or step + 1 == self.steps or not value.isfinite():  # alike on all ranks
                parts = run.together(partial(_terms, descend.totals, step))
                terms = {name: fmean(part[name] for part in parts) for name in parts[0]}
                run.log("distill", step, loss=value.item(), **terms)
            optimizer.step()
            schedule.step()
        student.requires_grad_(False).eval()
        for layer, quantizer in weight_quantizers(student).values():
            quantizer.follow(float_weight(layer))

    def _moved(self, batch: Batch, rng: torch.Generator) -> Batch:
        if not self.transforms:
            return batch
        images = batch.images
        for transform in self.transforms:
            images = transform.move(images, rng)
        return replace(batch, images=images, logits=None, tokens=None)  # the patches are elsewhere now


class _Once:
    def __init__(self, job: Job, loss: Loss | Objective, labels: LabelFilter | None) -> None:
        self.job, self.labels = job, labels
        self.needs = needs(loss) | {"student"}
        self.clean = start(loss, job)
        self.totals: tuple[Total, ...] = (self.clean,)

    def __call__(self, batch: Batch) -> Tensor:
        value = self.clean(self.view(batch, self.needs))
        value.backward()
        return value.detach()

    def view(self, batch: Batch, seen: frozenset[str]) -> View:
        view = self.job.view(batch, seen)
        return view if self.labels is None else view.relabelled(self.labels.believed(view))


class _Perturbed(_Once):
    def __init__(self, recipe: Perturbed, job: Job, loss: Loss | Objective, labels: LabelFilter | None) -> None:
        super().__init__(job, loss, labels)
        moved = recipe.moved or loss
        self.recipe, self.moved_needs = recipe, needs(moved) | {"student"}
        self.moved = start(moved, job)
        self.beside = None if recipe.beside is None else start(recipe.beside, job)
        self.beside_needs = frozenset[str]() if recipe.beside is None else needs(recipe.beside)
        self.totals = (self.clean, self.moved) if self.beside is None else (self.clean, self.moved, self.beside)
        self.learning = [parameter for parameter in job.student.parameters() if parameter.requires_grad]

    def __call__(self, batch: Batch) -> Tensor:
        images = batch.images.detach().requires_grad_()
        view = self.view(replace(batch, images=images, logits=None), self.needs | self.beside_needs)
        value = self.clean(view)
        if self.beside is None:
            value.backward()  # the student's gradients and the direction at once
            direction = images.grad
        else:  # the direction alone, then the student's gradients of both sums in one pass
            (direction,) = torch.autograd.grad(value, images, retain_graph=True)
            value = value + self.beside(view)
            value.backward(inputs=self.learning)
        assert direction is not None
        further = Batch(
            images.detach() + self.recipe.epsilon * direction.sign(),
            view.labels if view.labelled else None,
            tokens=batch.tokens,
        )
        harder = self.recipe.weight * self.moved(self.job.view(further, self.moved_needs))
        harder.backward()
        return value.detach() + harder.detach()


def _terms(totals: tuple[Total, ...], step: int) -> dict[str, float]:
    """The terms of a step that did not diverge."""
    for total in totals:
        total.check("distill", step)
    return totals[0].numbers()


class _Ranges:
    """The ranges of quantizers as something that can be tracked."""

    def __init__(self, quantizers: dict[str, ActivationQuantizer]) -> None:
        self._quantizers = quantizers

    def state_dict(self) -> dict[str, Any]:
        return {name: quantizer.range_state() for name, quantizer in self._quantizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, quantizer in self._quantizers.items():
            quantizer.restore_range(state[name])


def _let_learn(student: nn.Module, straight_through: str, student_bn: str) -> None:
    """Let everything of ``student`` learn but its scales, in place."""
    student.eval().requires_grad_(True)
    for module in student.modules():
        if isinstance(module, WeightQuantizer | ActivationQuantizer):
            module.scale.requires_grad_(False)
        if isinstance(module, ActivationQuantizer):
            module.clips_gradient = straight_through == "inside"
        if isinstance(module, _BatchNorm) and student_bn == "train":
            module.train()
