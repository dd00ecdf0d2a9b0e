"""Method, Paper, Job, Bits: what a paper is, and what one quantization is."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import fx

from zsq.core.errors import RecipeError, UnsupportedModel
from zsq.core.recipe import Recipe, needs
from zsq.core.run import Run
from zsq.core.source import Batch, Source
from zsq.core.teacher import Teacher, View

__all__ = ["FLOAT", "Bits", "Job", "Method", "NoData", "Paper", "Pass", "Synthesizer", "smoke"]

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
    """One quantization: the teacher, the student that passes change in place, and the run that carries it."""

    teacher: Teacher
    student: fx.GraphModule
    bits: Bits
    run: Run
    input_shape: tuple[int, int, int]
    """(C, H, W) of one image."""
    pixel_range: tuple[float, float] = (-2.5, 2.5)
    """The least and the largest value of a normalised pixel."""

    def view(self, batch: Batch, needs: frozenset[str]) -> View:
        """What the teacher, and the student where a loss asks for it, show on ``batch``."""
        student = self.student(batch.images) if "student" in needs else None
        return self.teacher.view(batch.images, needs, labels=batch.labels, student=student)


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
        """Raise UnsupportedModel if ``teacher`` cannot show what this method looks at."""
        missing = sorted(needs(self) - teacher.offers - {"labels", "student"})
        if missing:
            words = {"bn": "BatchNorm layers with running statistics", "attention": "attention maps"}
            raise UnsupportedModel(
                f"{self.name} reads {' and '.join(words.get(name, name) for name in missing)}, "
                "and this network has none"
            )


def smoke(method: Method) -> Method:
    """``method`` with every count shrunk to the least that still runs each line: for tests."""
    least = {"steps": 3, "batches": 1, "samples": 8, "batch_size": 4}
    changes = {}
    for path, value in method.leaves():
        name = path.rpartition(".")[2]
        if name in least and isinstance(value, int):
            changes[path] = min(value, least[name])
    return method.override(changes)
