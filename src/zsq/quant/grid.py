"""Integer grids: granularity, scale and zero point, the ranges behind them, and fake-quantization."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from zsq.core import Recipe, RecipeError, check_counts

__all__ = [
    "OMSE",
    "Affine",
    "Granularity",
    "Grid",
    "LpError",
    "MinMax",
    "PerChannel",
    "PerTensor",
    "Percentile",
    "PercentileSearch",
    "Range",
    "RangeAverage",
    "Scheme",
    "affine",
    "fake_quantize",
]

_SMALLEST_SCALE = 1e-12
"""Dead channels have range 0: any positive scale represents them, this one stays finite when it divides."""


class Affine(NamedTuple):
    """``x_int = round(x / scale) + zero_point`` within ``low .. high``; scale and zero point are (R,), one a row.

    Where levels are not evenly spaced, the kind of grid says what its scale means.
    """

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
class Grid(Recipe):
    """The kind of values that a quantized tensor may take."""

    learns: ClassVar[bool] = True
    """Whether q(x; scale) = scale * q(x / scale; 1): then the scale can be learned by the gradient of LSQ."""
    granularity: ClassVar[Granularity] = PerTensor()

    def limits(self, bits: int, signed: bool) -> tuple[int, int]:
        """The least and the largest integer."""
        return 0, 2**bits - 1

    def widened(self, low: Tensor, high: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
        """The interval ``low .. high`` (R,) that holds zero, as this grid can represent it."""
        return low, high

    @abstractmethod
    def over(self, low: Tensor, high: Tensor, bits: int, signed: bool = True) -> Affine:
        """The grid of 2^``bits`` values for ``low .. high`` (R,)."""

    def suited(self, grid: Affine, rows: Tensor) -> Affine:
        """``grid`` with all that depends on more of ``rows`` (R, n) than their ends."""
        return grid

    @abstractmethod
    def nearest(self, x: Tensor, grid: Affine) -> Tensor:
        """``x`` on ``grid``, whose scale and zero point broadcast against it."""

    @abstractmethod
    def ends(self, grid: Affine) -> tuple[Tensor, Tensor]:
        """The least and the largest value on ``grid``."""

    def candidates(self, grid: Affine, factors: Tensor) -> Tensor:
        """The scales (F, R) that a search may try: ``factors`` (F,) times that of ``grid``."""
        return factors[:, None] * grid.scale.reshape(1, -1)


@dataclass(frozen=True, kw_only=True)
class Scheme(Grid):
    """Evenly spaced values."""

    symmetric: bool = False
    """Zero point 0; signed, or unsigned where the data has no negative value. Otherwise an integer zero point."""
    granularity: Granularity = PerTensor()  # type: ignore[misc]  # a field here, one for all elsewhere
    signed: bool = False
    """Signed also where the data has no negative value; says nothing of a grid that is not symmetric."""

    def limits(self, bits: int, signed: bool) -> tuple[int, int]:
        """The least and the largest integer."""
        if self.symmetric and (signed or self.signed):
            return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        return 0, 2**bits - 1

    def widened(self, low: Tensor, high: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
        """``low .. high``, or the interval that mirrors its larger end."""
        if not self.symmetric:
            return low, high
        reach = torch.maximum(-low, high)
        return (-reach, reach) if signed or self.signed else (torch.zeros_like(high), high)

    def over(self, low: Tensor, high: Tensor, bits: int, signed: bool = True) -> Affine:
        """As ``affine``."""
        return affine(low, high, bits, self, signed)

    def nearest(self, x: Tensor, grid: Affine) -> Tensor:
        """As ``fake_quantize``."""
        return fake_quantize(x, *grid)

    def ends(self, grid: Affine) -> tuple[Tensor, Tensor]:
        """``scale * (low - zero_point)`` and ``scale * (high - zero_point)``."""
        return grid.scale * (grid.low - grid.zero_point), grid.scale * (grid.high - grid.zero_point)


@dataclass(frozen=True, kw_only=True)
class Range(Recipe):
    """How the interval behind a scale is found."""

    @abstractmethod
    def of(self, rows: Tensor, bits: int, scheme: Grid, signed: bool) -> tuple[Tensor, Tensor]:
        """The least and the largest value (R,) to represent, for ``rows`` (R, n); zero lies between them."""


@dataclass(frozen=True, kw_only=True)
class MinMax(Range):
    """Everything that was seen."""

    def of(self, rows: Tensor, bits: int, scheme: Grid, signed: bool) -> tuple[Tensor, Tensor]:
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

    def of(self, rows: Tensor, bits: int, scheme: Grid, signed: bool) -> tuple[Tensor, Tensor]:
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
    narrowest: float = 0.0
    """No share below it is tried."""

    def __post_init__(self) -> None:
        check_counts(self, "candidates")
        if self.p <= 0:
            raise RecipeError(f"p must be positive, got {self.p}")
        if not 0 <= self.narrowest <= 1:
            raise RecipeError(f"narrowest must lie in [0, 1], got {self.narrowest}")

    def of(self, rows: Tensor, bits: int, scheme: Grid, signed: bool) -> tuple[Tensor, Tensor]:
        """The best of the shrunken extremes, row by row; of equals the widest."""
        low, high = _extremes(rows, scheme, signed)
        least = torch.full_like(high, torch.inf)
        share = torch.ones_like(high)
        for step in range(self.candidates):
            tried = 1 - step / self.candidates
            if tried < self.narrowest - 1e-9:  # the share may be the bound itself, and both are rounded
                break
            mean = _error(rows, low * tried, high * tried, bits, scheme, signed, self.p)
            share = torch.where(mean < least, tried, share)
            least = torch.minimum(mean, least)
        return low * share, high * share


OMSE = LpError(p=2.0, narrowest=0.11)
"""Both ends shrunk by 0 to 89 %, whatever leaves the least squared error (FQ-ViT, PTQ for ViT)."""


@dataclass(frozen=True, kw_only=True)
class PercentileSearch(Range):
    """The pair of quantiles with the least squared error after rounding to nearest, row by row (RepQ-ViT, ERQ)."""

    shares: tuple[float, ...] = (0.999, 0.9999, 0.99999)
    """Of the values of a row, those below its upper end; as many lie above its lower end."""

    def __post_init__(self) -> None:
        if not self.shares or not all(0.5 < share <= 1 for share in self.shares):
            raise RecipeError(f"shares must lie in (0.5, 1], got {self.shares}")

    def of(self, rows: Tensor, bits: int, scheme: Grid, signed: bool) -> tuple[Tensor, Tensor]:
        """The best of the pairs; of equals the first."""
        pairs = zip(_upper_quantiles(-rows, self.shares), _upper_quantiles(rows, self.shares), strict=True)
        tried = [_extremes(torch.stack([-low, high], 1), scheme, signed) for low, high in pairs]
        errors = torch.stack([_error(rows, *ends, bits, scheme, signed, 2.0) for ends in tried])  # (P, R)
        best = errors.argmin(0, keepdim=True)
        low, high = (torch.stack(ends).gather(0, best)[0] for ends in zip(*tried, strict=True))
        return low, high


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


def _extremes(rows: Tensor, scheme: Grid, signed: bool) -> tuple[Tensor, Tensor]:
    """Least and largest value of each row, widened to hold zero, and to mirror each other where the grid does."""
    return scheme.widened(rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0), signed)


def _error(rows: Tensor, low: Tensor, high: Tensor, bits: int, scheme: Grid, signed: bool, p: float) -> Tensor:
    """Mean |x - q(x)|^p of each row (R,) on the grid over ``low .. high`` (R,)."""
    grid = scheme.over(low, high, bits, signed)
    columns = grid._replace(scale=grid.scale[:, None], zero_point=grid.zero_point[:, None])
    return scheme.nearest(rows, columns).sub_(rows).abs_().pow_(p).mean(1)


def _upper_quantiles(rows: Tensor, shares: tuple[float, ...]) -> list[Tensor]:
    """What ``shares`` of each row lie below, (R,) each, between two values linearly; sorts the upper tail only."""
    last = rows.shape[1] - 1
    places = [(1 - share) * last for share in shares]  # counted from the largest value
    tail = rows.topk(min(last, math.floor(max(places)) + 1) + 1, 1).values
    lower = [min(math.floor(place) + 1, last) for place in places]
    return [
        torch.lerp(tail[:, math.floor(place)], tail[:, next_], place - math.floor(place))
        for place, next_ in zip(places, lower, strict=True)
    ]
