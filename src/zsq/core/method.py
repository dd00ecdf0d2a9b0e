"""Method, Paper, Job, Bits: what a paper is, and what one quantization is."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, fx

from zsq.core.errors import RecipeError, UnsupportedModel
from zsq.core.recipe import Recipe, needs
from zsq.core.run import Run
from zsq.core.source import Batch, Source
from zsq.core.teacher import Teacher, View, look

__all__ = ["FLOAT", "Bits", "Job", "Method", "NoData", "Paper", "Pass", "Synthesizer", "Transform", "smoke"]

R = TypeVar("R", bound=Recipe)
FLOAT = 32
"""The bit width that means: not quantized."""


@dataclass(frozen=True)
class Bits:
    """Bits of weights and activations, 2 to 8 each, or 32 for float; written W4A4.

    >>> str(Bits.parse("w4a8"))
    'W4A8'
    """

    weights: int = 4
    activations: int = 4

    def __post_init__(self) -> None:
        for name, bits in (("weights", self.weights), ("activations", self.activations)):
            if bits != FLOAT and not 2 <= bits <= 8:
                raise RecipeError(f"{name} can have 2 to 8 bits, or {FLOAT} for float, got {bits}")

    def __str__(self) -> str:
        return f"W{self.weights}A{self.activations}"

    @classmethod
    def parse(cls, text: "str | Bits") -> "Bits":
        """Bits from text like ``w4a4``.

        Raises:
            RecipeError: if the text has another form, or a width that does not exist.
        """
        if isinstance(text, Bits):
            return text
        match = re.fullmatch(r"w(\d+)a(\d+)", text.strip().lower())
        if match is None:
            raise RecipeError(f"bits are written like w4a4 (weights, activations), got {text!r}")
        return cls(int(match[1]), int(match[2]))


@dataclass
class Job:
    """One quantization: the teacher, the student that passes change in place, and the run that carries it.

    The teacher learns from the student, who was captured, where its landmarks are.
    """

    teacher: Teacher
    student: fx.GraphModule
    bits: Bits
    run: Run
    input_shape: tuple[int, int, int]
    """(C, H, W) of one image."""
    pixel_box: tuple[tuple[float, float], ...] = ((-2.5, 2.5),)
    """The least and the largest value of a normalised pixel in each channel; one pair may stand for all."""

    made: list[Batch] = field(default_factory=list)
    """What a synthesizer of a finite set has made so far, for objectives that look back."""

    def __post_init__(self) -> None:
        self.teacher.landmarks = self.student.meta.get("landmarks", self.teacher.landmarks)

    @property
    def pixel_range(self) -> tuple[float, float]:
        """The least and the largest value of a normalised pixel in any channel."""
        return min(low for low, _ in self.pixel_box), max(high for _, high in self.pixel_box)

    @property
    def classes(self) -> int:
        """The number of logits K."""
        return self.teacher.view(torch.zeros(1, *self.input_shape, device=self.run.device)).logits.shape[1]

    def view(self, batch: Batch, needs: frozenset[str]) -> View:
        """What the teacher, and the student where a loss asks for it, show on ``batch``.

        The teacher does not run again where its logits are known and nothing else of it is asked for.
        """
        more: dict[str, Any] = {"labels": batch.labels}
        with self.run.autocast():
            if "student" in needs:
                asked, marks = needs - {"features"}, self.teacher.landmarks
                more["student"], seen = look(self.student, batch.images, asked, marks, batch.tokens)
                more |= {f"student_{name}": value for name, value in seen.items()}
            if batch.logits is not None and not needs & _TEACHERS:
                return View(batch.images, batch.logits, **more)
            return self.teacher.view(batch.images, needs, tokens=batch.tokens, **more)


_TEACHERS = frozenset({"bn", "features", "branches", "maps", "attention"})
"""What only a forward pass of the teacher shows."""


@runtime_checkable
class Transform(Protocol):
    """A change of images before a network looks at them."""

    def move(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """``images`` (N, C, H, W), changed; gradients flow through."""


@runtime_checkable
class Synthesizer(Protocol):
    """A way to make images."""

    live: ClassVar[bool]
    """False: a finite set. True: endless, and still learning while it is consumed."""

    def stream(self, job: Job) -> Iterator[Batch]:
        """The batches, in order; a live one does one learning step for each and sees ``job.student`` as it is now."""


@runtime_checkable
class Pass(Protocol):
    """One thing done to ``job.student``."""

    def apply(self, job: Job, source: Source) -> None:
        """Change ``job.student`` in place."""


ALWAYS = frozenset({"labels", "student"})
"""What a view of any network can show."""


@dataclass(frozen=True, kw_only=True)
class NoData(Recipe):
    """No images at all; a pass that asks for one is a mistake in the recipe."""

    live: ClassVar[bool] = False

    def stream(self, job: Job) -> Iterator[Batch]:
        """Nothing."""
        return iter(())


@dataclass(frozen=True, kw_only=True)
class Paper(Recipe):
    """Where a method comes from, and how surely its card could be followed."""

    title: str
    venue: str
    arxiv: str = ""
    confidence: Literal["high", "medium", "low"] = "high"


@dataclass(frozen=True, kw_only=True)
class Method(Recipe):
    """A paper as a value: one synthesizer and the passes that make a student low-bit."""

    name: str
    paper: Paper
    synthesizer: Synthesizer = field(default_factory=NoData)
    quantizer: tuple[Pass, ...]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Named sets of overrides; ``fast`` is what ``--effort fast`` means for this method."""

    def parts(self) -> dict[str, Any]:
        """The synthesizer and the passes: what a recipe is compared by."""
        return {"synthesizer": self.synthesizer, "quantizer": self.quantizer}

    def preset(self, name: str) -> "Method":
        """This method with the overrides of one of its presets; ``paper`` is the method as it stands.

        Raises:
            RecipeError: if there is no such preset; the message lists those that exist.
        """
        if name == "paper":
            return self
        if name not in self.presets:
            raise RecipeError(f"{self.name} has no preset {name!r}: there is {', '.join(('paper', *self.presets))}")
        return self.override(self.presets[name])

    @property
    def trains(self) -> bool:
        """Whether a pass learns something by gradient descent."""
        return any(getattr(step, "trains", False) for step in self.quantizer)

    def check(self, teacher: Teacher) -> None:
        """Return if this method can work on ``teacher``.

        Raises:
            UnsupportedModel: if the teacher cannot show what the method looks at.
            RecipeError: if a pass draws batches larger than the set of images, or its own ``check`` fails.
        """
        for step in self.quantizer:
            if hasattr(step, "check"):
                step.check()
            size = getattr(step, "batch_size", 0) if getattr(step, "draws_batches", False) else 0
            samples = getattr(getattr(step, "images", None) or self.synthesizer, "samples", size)
            if size > samples:
                raise RecipeError(
                    f"{type(step).__name__} draws batches of {size} from a set of {samples} images: "
                    "lower its batch_size or raise their samples"
                )
        missing = sorted(needs(self) - teacher.offers - ALWAYS)
        if missing:
            words = {
                "bn": "BatchNorm layers with running statistics",
                "attention": "attention maps",
                "tokens": "tokens of patches that can be left out",
                "class_token": "a class token",
                "features": "what a last layer reads",
                "branches": "maps of convolutions",
                "maps": "maps of convolutions",
            }
            raise UnsupportedModel(
                f"{self.name} reads {' and '.join(words.get(name, name) for name in missing)}, "
                "and this network has none"
            )


def smoke(recipe: R) -> R:
    """``recipe`` with every count shrunk to the least that still runs each line: for tests."""
    least = {"steps": 3, "batches": 1, "samples": 8, "batch_size": 4}
    changes = {}
    for path, value in recipe.leaves():
        name = path.rpartition(".")[2]
        if name in least and isinstance(value, int):
            changes[path] = min(value, least[name])
    return recipe.override(changes)
