"""SQuant (Guo et al., ICLR 2022, arXiv 2202.07471): flip a few roundings so that errors cancel in every kernel.

Follows the released code: asymmetric per-channel weights, quantizers on layer inputs with the first left float and
the last at 8 bits, and activation ranges from one batch of uniform noise (the README speaks of a BN rule instead).
The corner of its undo rule without any flip is mended: there, nothing can be undone.
The range constant is 12, 14 or 25 standard deviations at 4, 6 or 8 bits; 12 is the default, ``a6`` and ``a8`` presets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zsq.core import FLOAT, Method, Paper, Recipe, check_positive
from zsq.quant import Calibrate, Constant, Ends, Grid, InsertFakeQuant, LayerInputs, QuantizationProtocol, Range, Scheme
from zsq.synthesis import Noise, UniformPixels


@dataclass(frozen=True, kw_only=True)
class SQuantRounding(Recipe):
    """Round to nearest, then flip the cheapest weights to their other neighbour until error sums vanish.

    Afterwards an element's error is below 1, a kernel's sum at most 1 and an output channel's at most 1/2, except
    where the end of the grid forbids a flip.
    """

    kernels: bool = True
    """Balance every kernel (the stage K of the paper); kernels of one element are left to the channel."""
    channels: bool = True
    """Balance every output channel (stage C)."""

    def build(self, x: Tensor, low: Tensor, high: Tensor) -> nn.Module:
        """The integers of ``x = weight / scale`` (O, I, *kernel), decided once."""
        flat = x.flatten(2) if x.dim() > 2 else x[..., None]  # (O, I, k)
        error = flat.round().clamp(_ends(low, flat), _ends(high, flat)) - flat
        # An error below zero can be flipped up and one above down, unless that leaves the grid.
        free = torch.where(error < 0, flat < _ends(high, flat), flat > _ends(low, flat))
        if self.kernels and flat.shape[2] > 1:
            error, free = flip(error, free)
        if self.channels:
            error = flip(error.flatten(1)[:, None], free.flatten(1)[:, None])[0].view_as(flat)
        return Constant((flat + error).round().view_as(x))


def flip(error: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Flip the fewest ``free`` roundings so that every row of ``error`` (O, R, n) sums to at most 1/2.

    The largest errors go first. Also marks, one a row at most, what a later stage may flip: the last one flipped
    where the sum overshot (an undo), the next in line where it fell short. A flip moves the sum by exactly 1.
    """
    total = error.sum(-1, keepdim=True)
    gain = torch.where(free & (error * total.sign() > 0), error.abs(), -1.0)
    count = total.abs().round()
    order = gain.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1]).expand_as(order).to(order.device))
    chosen = (rank < count) & (gain > 0)
    spare = rank == torch.where(count >= total.abs(), count - 1, count)
    return torch.where(chosen, error - total.sign(), error), spare & (gain > 0)


def _ends(limit: Tensor, flat: Tensor) -> Tensor:
    return limit.reshape(-1, 1, 1).expand(len(flat), 1, 1)


@dataclass(frozen=True, kw_only=True)
class PositiveSigma(Range):
    """A multiple of the standard deviation: of the positive entries, or of all / 1.25 where some are negative."""

    sigmas: float = 12.0
    """The multiple."""

    def __post_init__(self) -> None:
        check_positive(self, "sigmas")

    def of(self, rows: Tensor, bits: int, scheme: Grid, signed: bool) -> tuple[Tensor, Tensor]:
        """The interval; below 6 bits it ends at the largest value seen."""
        spread = [_deviation(row / 1.25 if signed else row[row > 0]) for row in rows]
        high = self.sigmas * torch.stack(spread)
        if bits < 6:
            high = torch.minimum(high, rows.abs().amax(1))
        return (-high if signed else torch.zeros_like(high)), high


def _deviation(x: Tensor) -> Tensor:
    return x.std() if len(x) > 1 else x.new_zeros(())


SQUANT = Method(
    name="squant",
    paper=Paper(
        title="SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian Approximation",
        venue="ICLR 2022",
        arxiv="2202.07471",
    ),
    synthesizer=Noise(pixels=UniformPixels(low=0.0, high=1.0), samples=256),
    quantizer=(
        InsertFakeQuant(
            protocol=QuantizationProtocol(
                name="minmax-ptq-inputs",
                placement=LayerInputs(),
                ends=Ends(first_input=FLOAT, last_input=8),
                activations=Scheme(symmetric=True),
            ),
            rounding=SQuantRounding(),
        ),
        Calibrate(range=PositiveSigma(), samples=256, batch_size=256),
    ),
    presets={
        "fast": {},
        "a6": {"quantizer.calibrate.range.sigmas": 14.0},
        "a8": {"quantizer.calibrate.range.sigmas": 25.0},
        "e": {
            "quantizer.insert_fake_quant.rounding.kernels": False,
            "quantizer.insert_fake_quant.rounding.channels": False,
        },
        "k": {"quantizer.insert_fake_quant.rounding.channels": False},
        "c": {"quantizer.insert_fake_quant.rounding.kernels": False},
    },
)
