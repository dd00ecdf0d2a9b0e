"""Integer grids: granularity, scale and zero point, the ranges behind them, and fake-quantization."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from zsq.core import Recipe, RecipeError, check_counts

__all__ = [
    "Affine",
    "Granularity",
    "LpError",
    "MinMax",
    "PerChannel",
    "PerTensor",
    "Percentile",
    "Range",
    "RangeAverage",
    "Scheme",
    "affine",
    "fake_quantize",
]

_SMALLEST_SCALE = 1e-12
"""Dead channels have range 0: any positive scale represents them, this one stays finite when it divides."""


class Affine(NamedTuple):
    """``x_int = round(x / scale) + zero_point`` within ``low .. high``; scale and zero point are (R,), one a row."""

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int


class Granularity(Protocol):
    """Which weights share a scale."""

    def rows(self, weight: Tensor, axis: int) -> Tensor:
        """``weight`` as (R, n), one row a scale; ``axis`` is that of the output channels."""

    def spread(self, rows: Tensor, weight: Tensor, axis: int) -> Tensor:
        """Row values (R,) in a shape that broadcasts against ``weight``."""


@dataclass(frozen=True, kw_only=True)
class PerTensor(Recipe):
    """One scale for all."""

    def rows(self, weight: Tensor, axis: int) -> Tensor:
        """``weight`` as (1, n)."""
        return weight.reshape(1, -1)

    def spread(self, rows: Tensor, weight: Tensor, axis: int) -> Tensor:
        """(1, 1, ...)."""
        return rows.reshape([1] * weight.dim())


@dataclass(frozen=True, kw_only=True)
class PerChannel(Recipe):
    """One scale for each output channel."""

    def rows(self, weight: Tensor, axis: int) -> Tensor:
        """``weight`` as (O, n)."""
        return weight.movedim(axis, 0).reshape(weight.shape[axis], -1)

    def spread(self, rows: Tensor, weight: Tensor, axis: int) -> Tensor:
        """(O, 1, ...) with O at ``axis``."""
        shape = [1] * weight.dim()
        shape[axis] = -1
        return rows.reshape(shape)


@dataclass(frozen=True, kw_only=True)
class Scheme(Recipe):
    """The kind of grid."""

    symmetric: bool = False
    """Zero point 0; signed, or unsigned where the data has no negative value. Otherwise an integer zero point."""
    granularity: Granularity = PerTensor()
    signed: bool = False
    """Signed also where the data has no negative value; says nothing of a grid that is not symmetric."""

    def limits(self, bits: int, signed: bool) -> tuple[int, int]:
        """The least and the largest integer."""
        if self.symmetric and (signed or self.signed):
            return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        return 0, 2**bits - 1


@dataclass(frozen=True, kw_only=True)
class Range(Recipe):
    """How the interval behind a scale is found."""

    @abstractmethod
    def of(self, rows: Tensor, bits: int, scheme: Scheme, signed: bool) -> tuple[Tensor, Tensor]:
        """The least and the largest value (R,) to represent, for ``rows`` (R, n); zero lies between them."""


@dataclass(frozen=True, kw_only=True)
class MinMax(Range):
    """Everything that was seen."""

    def of(self, rows: Tensor, bits: int, scheme: Scheme, signed: bool) -> tuple[Tensor, Tensor]:
        """The extremes."""
        return _extremes(rows, scheme, signed)


@dataclass(frozen=True, kw_only=True)
class Percentile(Range):
    """All but the most extreme values: outliers do not stretch the grid."""

    share: float = 0.9999
    """Share of the values between the two ends."""

    def __post_init__(self) -> None:
        if not 0.5 < self.share <= 1:
            raise RecipeError(f"share must lie in (0.5, 1], got {self.share}")

    def of(self, rows: Tensor, bits: int, scheme: Scheme, signed: bool) -> tuple[Tensor, Tensor]:
        """The (1 - share) / 2 quantiles at both ends, each rounded outwards to a value that was seen."""
        cut = int((1 - self.share) / 2 * rows.shape[1])
        low = rows.kthvalue(cut + 1, dim=1).values
        high = rows.kthvalue(rows.shape[1] - cut, dim=1).values
        return _extremes(torch.stack([low, high], 1), scheme, signed)


@dataclass(frozen=True, kw_only=True)
class LpError(Range):
    """The share of the extremes with the least mean |x - q(x)|^p after rounding to nearest."""

    p: float = 2.4
    """Exponent; above 2 it weighs clipped outliers more."""
    candidates: int = 100
    """Shares tried: 1, 1 - 1/candidates, ..., 1/candidates."""

    def __post_init__(self) -> None:
        check_counts(self, "candidates")
        if self.p <= 0:
            raise RecipeError(f"p must be positive, got {self.p}")

    def of(self, rows: Tensor, bits: int, scheme: Scheme, signed: bool) -> tuple[Tensor, Tensor]:
        """The best of the shrunken extremes, row by row; of equals the widest."""
        low, high = _extremes(rows, scheme, signed)
        least = torch.full_like(high, torch.inf)
        share = torch.ones_like(high)
        for step in range(self.candidates):
            tried = 1 - step / self.candidates
            grid = affine(low * tried, high * tried, bits, scheme, signed)
            error = fake_quantize(rows, grid.scale[:, None], grid.zero_point[:, None], grid.low, grid.high)
            mean = error.sub_(rows).abs_().pow_(self.p).mean(1)
            share = torch.where(mean < least, tried, share)
            least = torch.minimum(mean, least)
        return low * share, high * share


@dataclass(frozen=True, kw_only=True)
class RangeAverage(Recipe):
    """An exponential moving average of the ends of batches, corrected for its start at zero.

    r_t = decay * r_(t-1) + (1 - decay) * x_t with r_0 = 0, read as r_t / (1 - decay^t).
    """

    decay: float = 0.9
    correction: Literal["on reading", "fed back"] = "on reading"
    """Whether the corrected value is only read, or also stored as r_t, as the code of the GDFQ family has it.

    A constant input of 1 then reads 1, 5.26, 17.8 ... 3945 at update 21 and 1.014 at 150."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise RecipeError(f"decay must lie in [0, 1), got {self.decay}")

    def update(
        self, kept: tuple[Tensor, Tensor] | None, ends: tuple[Tensor, Tensor], count: int
    ) -> tuple[Tensor, Tensor]:
        """r_t of both ends, where ``ends`` are those of batch ``count`` (from 1) and ``kept`` is r_(t-1)."""
        share = 1 - self.decay**count if self.correction == "fed back" else 1.0
        old = kept or (torch.zeros_like(ends[0]), torch.zeros_like(ends[1]))
        low, high = ((self.decay * r + (1 - self.decay) * x) / share for r, x in zip(old, ends, strict=True))
        return low, high

    def read(self, kept: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
        """The ends after ``count`` batches."""
        share = 1.0 if self.correction == "fed back" else 1 - self.decay**count
        return kept[0] / share, kept[1] / share


def affine(low: Tensor, high: Tensor, bits: int, scheme: Scheme, signed: bool = True) -> Affine:
    """The grid of 2^``bits`` integers over ``low .. high`` (R,).

    scale = (high - low) / (2^b - 1), zero_point = round(-low / scale), or 0 if symmetric. Scales are always positive
    and finite, also where ``low == high``.
    """
    scale = ((high - low) / (2**bits - 1)).clamp(min=_SMALLEST_SCALE)
    zero_point = torch.zeros_like(scale) if scheme.symmetric else (-low / scale).round()
    return Affine(scale, zero_point, *scheme.limits(bits, signed))


def fake_quantize(x: Tensor, scale: Tensor | float, zero_point: Tensor | float, low: int, high: int) -> Tensor:
    """``x`` moved to the nearest of the values ``scale * (low - zero_point) .. scale * (high - zero_point)``.

    >>> fake_quantize(torch.tensor([0.4, 1.6, 5.0]), 1.0, 0.0, 0, 3).tolist()
    [0.0, 2.0, 3.0]
    """
    return (x / scale).round_().add_(zero_point).clamp_(low, high).sub_(zero_point).mul_(scale)


def _extremes(rows: Tensor, scheme: Scheme, signed: bool) -> tuple[Tensor, Tensor]:
    """Least and largest value of each row, widened to hold zero, and to mirror each other where the grid does."""
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if not scheme.symmetric:
        return low, high
    reach = torch.maximum(-low, high)
    return (-reach, reach) if signed or scheme.signed else (torch.zeros_like(high), high)
