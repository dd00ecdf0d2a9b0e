"""GENIE (Jeon et al., CVPR 2023, arXiv 2212.04780): latents and a throw-away generator, then block reconstruction.

Follows the released code where the paper is silent: standard deviations, squares averaged over channels, the last
iterate. Corrected here: mini-batches have ``batch_size`` images whatever their number (the code's have N / 32), a
scale cannot become negative, and layers outside of blocks are fitted with the BatchNorm and activation behind them
(the code targets the bare convolution). Its learning rates are named for what they drive; in the code the two names
are swapped. The preset ``qdrop-ends`` has no 8-bit second input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zsq.core import Job, Method, Paper, Recipe, RecipeError
from zsq.losses import BNStatistics, ImageStatistics
from zsq.quant import PTQ_8BIT_ENDS, AdaRound, InsertFakeQuant, LpError, ReconstructBlocks
from zsq.synthesis import OptimizeLatents


@dataclass(frozen=True, kw_only=True)
class SwingConvolutions(Recipe):
    """Move the input of every strided convolution at random, so that no position is skipped each time."""

    shift: int = 1
    """Largest move in pixels, up, down, left or right."""

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise RecipeError(f"a shift cannot be negative, got {self.shift}")

    def build(self, job: Job) -> Callable[[nn.Module], nn.Module]:
        """A function that changes a copy of the teacher's network."""
        rng = job.run.generator("swing")

        def change(network: nn.Module) -> nn.Module:
            for layer in network.modules():
                if isinstance(layer, nn.Conv2d) and any(stride > 1 for stride in layer.stride):
                    layer.register_forward_pre_hook(lambda _, inputs: (swing(inputs[0], self.shift, rng),))
            return network

        return change


def swing(x: Tensor, shift: int, rng: torch.Generator) -> Tensor:
    """``x`` (N, C, H, W) moved by up to ``shift`` pixels each way, all images alike; the border is reflected.

    A side of ``shift`` pixels or fewer has nothing to reflect and stays.
    """
    for dim, offset in zip((2, 3), torch.randint(-shift, shift + 1, (2,), generator=rng).tolist(), strict=True):
        x = _reflected(x, dim, offset) if x.shape[dim] > shift else x
    return x


def _reflected(x: Tensor, dim: int, offset: int) -> Tensor:
    """``x`` read from ``offset`` pixels further along ``dim``: two slices, much cheaper than padding and cropping."""
    size = x.shape[dim]
    if offset == 0:
        return x
    kept = x.narrow(dim, max(offset, 0), size - abs(offset))
    if offset > 0:
        return torch.cat([kept, x.narrow(dim, size - 1 - offset, offset).flip(dim)], dim)
    return torch.cat([x.narrow(dim, 1, -offset).flip(dim), kept], dim)


GENIE = Method(
    name="genie",
    paper=Paper(title="Genie: Show Me the Data for Quantization", venue="CVPR 2023", arxiv="2212.04780"),
    synthesizer=OptimizeLatents(
        loss=BNStatistics(over="batch", spread="std", channels="mean") + ImageStatistics(),
        change=SwingConvolutions(),
        samples=1024,
        batch_size=128,
        steps=4_000,
    ),
    quantizer=(
        InsertFakeQuant(protocol=PTQ_8BIT_ENDS, range=LpError(p=2.4), rounding=AdaRound()),
        ReconstructBlocks(samples=1024, steps=20_000),
    ),
    presets={
        "fast": {
            "synthesizer.samples": 128,
            "synthesizer.steps": 250,
            "quantizer.reconstruct_blocks.samples": 128,
            "quantizer.reconstruct_blocks.steps": 500,
        },
        "qdrop-ends": {"quantizer.insert_fake_quant.protocol.ends.second_input": None},
    },
)
