"""Images of which fewer and fewer patches are looked at."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq.core import Batch, Job, Recipe, RecipeError, Transform, View
from zsq.synthesis.sampling import Shift, ShiftAndFlip

__all__ = ["FinalAttention", "Mask", "StopPatches", "Stopping", "Survivors"]


class Mask(Protocol):
    """What becomes of the images when the last step is done."""

    def keep(self, job: Job, pixels: Tensor, tokens: Tensor, share: float) -> Batch:
        """The images ``pixels`` (N, C, H, W) of which ``tokens`` (N, k) were looked at to the end.

        ``share`` is how much is left of all patches.
        """


@dataclass(frozen=True, kw_only=True)
class Survivors(Recipe):
    """Keep the patches that were looked at to the end, and blank the others."""

    def keep(self, job: Job, pixels: Tensor, tokens: Tensor, share: float) -> Batch:
        """The images and their tokens."""
        return Batch(pixels * shown(job, tokens), tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class FinalAttention(Recipe):
    """As the released code: rank all patches again, on pixels in 0..1, then store 8 bits, and black as grey."""

    def keep(self, job: Job, pixels: Tensor, tokens: Tensor, share: float) -> Batch:
        """The images and their tokens."""
        low, high = torch.tensor(job.pixel_box).T[:, None, :, None, None].to(pixels)
        stored = (pixels - low) / (high - low)
        every = every_token(job, pixels)
        # the class token counts among what is left: 47 of 197, where the stops leave 46 of 196
        prefix, left = job.teacher.landmarks.prefix, int((1 + math.prod(job.teacher.landmarks.grid)) * share)
        tokens = most_attended(every, importance(job, stored, every), prefix, left)
        stored = (stored * shown(job, tokens) * 255).floor() / 255
        return Batch(torch.where(stored == 0, 0.0, low + stored * (high - low)), tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class StopPatches(Recipe):
    """Leave out, at given steps, the patches of each image that the class token attends to least.

    A look is moved by the jitter, and the patches left are looked for where they were moved to, to the nearest whole
    patch. The looks at a stop and before it, in which attention is read, are not moved. What is left out is neither
    computed nor changed by the teacher; total variation and the momentum of the optimizer still move its pixels.
    """

    stops: tuple[int, ...] = (50, 100, 200, 300)
    """Steps, from 1 up."""
    share: float = 0.3
    """The share of the remaining patches that is left out at each."""
    mask: Mask = Survivors()
    """What becomes of the images at the end."""

    needs: ClassVar[frozenset[str]] = frozenset({"attention", "tokens", "class_token"})

    def __post_init__(self) -> None:
        if any(later <= earlier for earlier, later in zip((0, *self.stops), self.stops, strict=False)):
            raise RecipeError(f"stops must be steps in ascending order, from 1 up, got {self.stops}")
        if not 0 < self.share < 1:
            raise RecipeError(f"share must lie between 0 and 1, got {self.share}")

    def begin(self, job: Job, count: int, rng: torch.Generator) -> "Stopping":
        """The looks at one batch."""
        return Stopping(self, job, rng)


class Stopping:
    """The looks at one batch whose patches are left out one after the other."""

    def __init__(self, rule: StopPatches, job: Job, rng: torch.Generator) -> None:
        self.rule, self.job, self.rng = rule, job, rng
        self.tokens: Tensor | None = None
        """The tokens (N, k) that are left; None before the first stop."""
        self._next = torch.empty(0)
        self._stops = 0

    def view(self, step: int, pixels: Tensor, jitter: Transform | None, needs: frozenset[str], **more: Any) -> View:
        """What the teacher sees of the patches that are left."""
        marks, look = self.job.teacher.landmarks, self.job.teacher.view
        if step in self.rule.stops:
            self.tokens, self._stops = self._next, self._stops + 1
        if step + 1 in self.rule.stops:
            self._next = self._fewer(pixels)
        if {step, step + 1} & set(self.rule.stops) or not isinstance(jitter, ShiftAndFlip):
            return look(pixels, needs, tokens=self.tokens, pixels=pixels, **more)
        shift, tokens = jitter.draw(pixels, self.rng), self.tokens
        if tokens is not None:
            patch = pixels.shape[2] / marks.grid[0], pixels.shape[3] / marks.grid[1]
            tokens = moved(tokens, shift, marks.prefix, marks.grid, patch)
        return look(shift.move(pixels), needs, tokens=tokens, pixels=pixels, **more)

    def made(self, pixels: Tensor) -> Batch:
        """The images with what is left of them."""
        if self.tokens is None:
            return Batch(pixels)
        return self.rule.mask.keep(self.job, pixels, self.tokens, (1 - self.rule.share) ** self._stops)

    def _fewer(self, pixels: Tensor) -> Tensor:
        """The tokens that stay at the next stop."""
        prefix, tokens = self.job.teacher.landmarks.prefix, self.tokens
        if tokens is None:
            tokens = every_token(self.job, pixels)
        left = int((tokens.shape[1] - prefix) * (1 - self.rule.share))
        return most_attended(tokens, importance(self.job, pixels, tokens), prefix, max(left, 1))


def every_token(job: Job, pixels: Tensor) -> Tensor:
    """All tokens of each image: (N, T)."""
    marks = job.teacher.landmarks
    return torch.arange(marks.prefix + math.prod(marks.grid), device=pixels.device).expand(len(pixels), -1)


def importance(job: Job, pixels: Tensor, tokens: Tensor) -> Tensor:
    """How much the class token reads of each patch among ``tokens`` (N, k): (N, patches)."""
    with torch.no_grad():  # with gradients, attention in separate products would need the most memory of the run
        view = job.teacher.view(pixels, frozenset({"attention"}), tokens=tokens)
    return attention_of_class_token(view, job.teacher.landmarks.prefix)


def attention_of_class_token(view: View, prefix: int) -> Tensor:
    """How much the class token reads of each patch in the last attention, the mean over heads: (N, patches)."""
    return view.attention[-1].probabilities[:, :, 0, prefix:].mean(1)


def most_attended(tokens: Tensor, attention: Tensor, prefix: int, count: int) -> Tensor:
    """Of ``tokens`` (N, k), the ``prefix`` first and the ``count`` patches of most ``attention`` (N, k - prefix)."""
    best = attention.topk(count, 1).indices
    return torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, best)], 1)


def moved(tokens: Tensor, shift: Shift, prefix: int, grid: tuple[int, int], patch: tuple[float, float]) -> Tensor:
    """Where the patches of ``tokens`` (N, k) are in an image that is moved by ``shift``, to the nearest whole patch.

    ``grid`` is the rows and columns of patches, ``patch`` the height and width of one in pixels. Half a patch is a
    whole one downwards and to the right, and none the other way, as in the released code.

    >>> moved(torch.tensor([[0, 1, 196]]), Shift(16, 0, False), 1, (14, 14), (16, 16)).tolist()
    [[0, 15, 14]]
    """
    rows, columns = grid
    place = tokens - prefix
    row = (place // columns + math.floor(shift.down / patch[0] + 0.5)) % rows
    column = (place % columns + math.floor(shift.right / patch[1] + 0.5)) % columns
    if shift.mirrored:
        column = columns - 1 - column
    return torch.where(place < 0, tokens, prefix + row * columns + column)


def shown(job: Job, tokens: Tensor) -> Tensor:
    """1 at the pixels of the patches in ``tokens`` (N, k), 0 elsewhere: (N, 1, H, W)."""
    marks = job.teacher.landmarks
    patches = torch.zeros(len(tokens), marks.prefix + math.prod(marks.grid), device=tokens.device)
    patches = patches.scatter(1, tokens, 1.0)[:, marks.prefix :].unflatten(1, (1, *marks.grid))
    return F.interpolate(patches, job.input_shape[1:], mode="nearest")
