"""Grids for what attention, GELU and LayerNorm make: logarithmic, in two parts, and scaled by powers of two."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zsq.core import Recipe
from zsq.quant.grid import Affine, Granularity, Grid, PerChannel, Scheme, affine, fake_quantize

__all__ = ["Log2", "LogSqrt2", "PowerOfTwoFactors", "TwinGELU", "TwinSoftmax", "grid_from", "grid_words"]


@dataclass(frozen=True, kw_only=True)
class _Logarithmic(Grid):
    """``scale * 2^(-q / steps)`` for q = 0, 1, ..., and 0; of values from 0 to ``scale``."""

    zero: Literal["last code", "beside"] = "last code"
    """Whether 0 takes the last of the 2^b codes, or comes in addition to them, as in the released codes."""

    steps: ClassVar[int]
    """Values an octave."""

    def nearest(self, x: Tensor, grid: Affine) -> Tensor:
        """The nearest exponent, half to even; 0 where that lies beyond the last one."""
        q = (x / grid.scale).clamp(min=0).log2_().mul_(-self.steps).round_()
        y = torch.exp2(q / -self.steps).mul_(grid.scale)
        return y.masked_fill_(q > grid.high - (self.zero == "last code"), 0.0).minimum(grid.scale)

    def ends(self, grid: Affine) -> tuple[Tensor, Tensor]:
        """0 and ``scale``."""
        return torch.zeros_like(grid.scale), grid.scale


@dataclass(frozen=True, kw_only=True)
class Log2(_Logarithmic):
    """Powers of two down from 1, whatever the range (FQ-ViT): for probabilities, which are shifts then."""

    steps: ClassVar[int] = 1
    learns: ClassVar[bool] = False

    def over(self, low: Tensor, high: Tensor, bits: int, signed: bool = True) -> Affine:
        """1 is always the largest."""
        return Affine(torch.ones_like(high), torch.zeros_like(high), *self.limits(bits, signed))

    def candidates(self, grid: Affine, factors: Tensor) -> Tensor:
        """Only 1."""
        return grid.scale.reshape(1, -1)


@dataclass(frozen=True, kw_only=True)
class LogSqrt2(_Logarithmic):
    """Powers of the square root of two down from ``high`` (RepQ-ViT), which a search of the range may lower.

    d 2^(-q/2) = d 2^(-ceil(q/2)) (sqrt(2) if q is odd, else 1): a shift, and one of two scales.
    """

    steps: ClassVar[int] = 2

    def over(self, low: Tensor, high: Tensor, bits: int, signed: bool = True) -> Affine:
        """``high`` is the largest."""
        return Affine(high.clamp(min=1e-12), torch.zeros_like(high), *self.limits(bits, signed))


@dataclass(frozen=True, kw_only=True)
class TwinSoftmax(Grid):
    """Two uniform grids of 2^(b-1) codes each (PTQ4ViT): one from 0 to a split c, one from 0 to 1, read above c.

    Piecewise; the released code adds both parts and so shifts every value by about c. ``scale`` is the step below c,
    c / (2^(b-1) - 1).
    """

    splits: int = 20
    """Splits tried: 1, 1/2, 1/4, ..."""

    learns: ClassVar[bool] = False

    def over(self, low: Tensor, high: Tensor, bits: int, signed: bool = True) -> Affine:
        """The split at 0.01, where a search starts."""
        least, most = self.limits(bits, signed)
        return Affine(torch.full_like(high, 0.01 / _last(least, most)), torch.zeros_like(high), least, most)

    def suited(self, grid: Affine, rows: Tensor) -> Affine:
        """The split with the least squared error."""
        scales = self.candidates(grid, torch.ones(1))
        errors = [(self.nearest(rows, grid._replace(scale=scale)) - rows).square().mean() for scale in scales]
        return grid._replace(scale=scales[int(torch.stack(errors).argmin())])

    def nearest(self, x: Tensor, grid: Affine) -> Tensor:
        """Below c on the fine grid, from c on on the coarse one."""
        last = _last(grid.low, grid.high)
        fine = (x / grid.scale).round_().clamp_(0, last).mul_(grid.scale)
        coarse = (x * last).round_().clamp_(0, last).div_(last)
        return torch.where(x < grid.scale * last, fine, coarse)

    def ends(self, grid: Affine) -> tuple[Tensor, Tensor]:
        """0 and 1."""
        return torch.zeros_like(grid.scale), torch.ones_like(grid.scale)

    def candidates(self, grid: Affine, factors: Tensor) -> Tensor:
        """The steps of the splits 2^0, 2^-1, ... (F, 1), whatever the factors."""
        splits = torch.exp2(-torch.arange(self.splits, dtype=grid.scale.dtype, device=grid.scale.device))
        return splits[:, None] / _last(grid.low, grid.high)


@dataclass(frozen=True, kw_only=True)
class TwinGELU(Grid):
    """Two uniform grids of 2^(b-1) codes each (PTQ4ViT): ``scale`` above 0, and 0.17 / 2^(b-1) below.

    0.16997 is as far as GELU goes below 0.
    """

    learns: ClassVar[bool] = False

    def over(self, low: Tensor, high: Tensor, bits: int, signed: bool = True) -> Affine:
        """scale = high / (2^(b-1) - 1/2)."""
        scale = (high / (2 ** (bits - 1) - 0.5)).clamp(min=1e-12)
        return Affine(scale, torch.zeros_like(high), *self.limits(bits, signed))

    def nearest(self, x: Tensor, grid: Affine) -> Tensor:
        """The sum of the two parts, which meet at 0."""
        last = _last(grid.low, grid.high)
        fine = _GELU_DEPTH / (last + 1)
        above = (x / grid.scale).round_().clamp_(0, last).mul_(grid.scale)
        return (x / fine).round_().clamp_(-(last + 1), 0).mul_(fine).add_(above)

    def ends(self, grid: Affine) -> tuple[Tensor, Tensor]:
        """The depth of GELU, and the last code above 0."""
        return torch.full_like(grid.scale, -_GELU_DEPTH), grid.scale * _last(grid.low, grid.high)


_GELU_DEPTH = 0.16997124
"""-min GELU(x), reached at x = -0.7518; to 8 digits as the released code has it."""


@dataclass(frozen=True, kw_only=True)
class PowerOfTwoFactors(Grid):
    """One grid whose step is doubled 0 to ``factors`` times in each channel, with a common zero point (FQ-ViT).

    The exponent of a channel is that with the least squared error; the widest one gives the range of the tensor.
    """

    factors: int = 3
    """Largest exponent."""

    learns: ClassVar[bool] = False
    granularity: ClassVar[Granularity] = PerChannel()

    def over(self, low: Tensor, high: Tensor, bits: int, signed: bool = True) -> Affine:
        """The grid over the range of all channels (1,)."""
        return affine(low.amin(0, keepdim=True), high.amax(0, keepdim=True), bits, Scheme())

    def suited(self, grid: Affine, rows: Tensor) -> Affine:
        """A scale for each channel (C,)."""
        scales = [grid.scale / 2 ** (self.factors - exponent) for exponent in range(self.factors + 1)]
        zero_point = grid.zero_point.expand(len(rows))
        errors = [
            (fake_quantize(rows, s, grid.zero_point, grid.low, grid.high) - rows).square().mean(1) for s in scales
        ]
        return Affine(torch.cat(scales)[torch.stack(errors).argmin(0)], zero_point, grid.low, grid.high)

    def nearest(self, x: Tensor, grid: Affine) -> Tensor:
        """As ``fake_quantize``."""
        return fake_quantize(x, *grid)

    def ends(self, grid: Affine) -> tuple[Tensor, Tensor]:
        """Those of each channel."""
        return Scheme().ends(grid)


def _last(low: int, high: int) -> int:
    """2^(b-1) - 1, the last code of one of two halves of ``low .. high``."""
    return (high - low + 1) // 2 - 1


_KINDS: dict[str, type[Grid]] = {
    each.__name__: each for each in (Scheme, Log2, LogSqrt2, TwinSoftmax, TwinGELU, PowerOfTwoFactors)
}


def grid_words(grid: Grid) -> dict[str, Any]:
    """``grid`` as a file says it: the name of its class and its plain values; the granularity is that of the scales.

    >>> grid_words(Scheme(symmetric=True))
    {'kind': 'Scheme', 'symmetric': True, 'signed': False}
    """
    plain = {name: value for name, value in grid.parts().items() if not isinstance(value, Recipe)}
    return {"kind": type(grid).__name__, **plain}


def grid_from(words: dict[str, Any]) -> Grid:
    """The grid that ``grid_words`` described; KeyError or TypeError if there is none of this kind."""
    return _KINDS[words["kind"]](**{name: value for name, value in words.items() if name != "kind"})
