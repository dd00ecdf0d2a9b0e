"""ReconstructBlocks: fit one block of the student after the other to the teacher's."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from zsq.core import Job, Recipe, RecipeError, Source, check_counts, check_positive
from zsq.core.teacher import only_tokens
from zsq.nets.graph import blocks, extract
from zsq.quant.grid import LpError, Range
from zsq.quant.quantizers import activation_quantizers, float_mode, mix, random_mask, weight_quantizers
from zsq.quant.rounding import LearnedRounding

__all__ = ["ReconstructBlocks", "annealed"]


@dataclass(frozen=True, kw_only=True)
class ReconstructBlocks(Recipe):
    """Learn the rounding, the weight scales and the activation scales of each block from the images.

    For one block: mean over (N, H, W) of sum over C of (student - teacher)^2, plus ``round_weight`` times AdaRound's
    regularizer. The block reads a mix of the teacher's input and of what the finished blocks before it make of it,
    and its activations stay float with probability ``drop`` (QDrop, Wei et al. 2022). Of an image that is to be seen by
    some of its tokens, the block that makes them hands on those alone.
    """

    range: Range = LpError()
    """How activation ranges start, on the first batch that reaches a block."""
    samples: int = 1024
    """Images to fit to, at most."""
    steps: int = 20_000
    """Steps a block."""
    batch_size: int = 32
    lr_rounding: float = 1e-3
    """Adam learning rate of the rounding variables."""
    lr_weight_scale: float = 1e-4
    lr_activation_scale: float = 4e-5
    """Adam learning rates of the scales, annealed to 0 along a cosine."""
    drop: float = 0.5
    """Probability with which an element of an activation stays float while fitting."""
    round_weight: float = 1.0
    warm_up: float = 0.2
    """Share of the steps before the regularizer sets in."""
    beta: tuple[float, float] = (20.0, 2.0)
    """Its exponent after the warm-up and at the end."""

    trains: ClassVar[bool] = True
    reads_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self, "samples", "steps", "batch_size")
        check_positive(self, "lr_rounding")
        if not (self.lr_weight_scale >= 0 and self.lr_activation_scale >= 0 and self.round_weight >= 0):
            raise RecipeError("the learning rates of scales and round_weight cannot be negative; 0 keeps them fixed")
        if not 0 <= self.drop < 1 or not 0 <= self.warm_up < 1:
            raise RecipeError(f"drop and warm_up must lie in [0, 1), got {self.drop} and {self.warm_up}")

    def apply(self, job: Job, source: Source) -> None:
        """Change ``job.student`` in place; every block is a piece of work of its own."""
        graph = job.student
        batch, mark = source.take(self.samples), job.teacher.landmarks.tokens
        exact = quantized = batch.images
        for index, block in enumerate(blocks(graph)):
            part = extract(graph, block)
            tokens = batch.tokens if mark in dict(part.named_modules()) else None
            run = partial(_run, part, mark, tokens)
            with float_mode(part):
                target = _in_batches(run, exact)
            fit = partial(self._fit, part, run, exact, quantized, target, job, block.name)
            _install(part, job.run.cached(f"reconstruct/{index}", fit))
            exact, quantized = target, _in_batches(run, quantized)

    def _fit(
        self,
        part: fx.GraphModule,
        run: "_Run",
        exact: Tensor,
        quantized: Tensor,
        target: Tensor,
        job: Job,
        name: str,
    ) -> dict[str, Any]:
        """Learn one block on inputs ``exact`` and ``quantized`` (N, ...); returns its state."""
        weights = [quantizer for _, quantizer in weight_quantizers(part).values()]
        rounding = [quantizer.rounding for quantizer in weights if isinstance(quantizer.rounding, LearnedRounding)]
        activations = list(activation_quantizers(part).values())
        rng = job.run.generator("drop")
        for quantizer in activations:
            quantizer.drop, quantizer.rng = self.drop, rng
            quantizer.observe(self.range)
        with torch.no_grad():
            first = slice(self.batch_size)
            run(quantized[first], first)
        for quantizer in activations:
            quantizer.observe(None)
        fitted = [q for q in activations if q.holds is None]  # what a range must hold, these images may not have
        if not weights and not fitted:
            return _state(part)
        learned = [
            {"params": [q.scale.requires_grad_() for q in weights], "lr": self.lr_weight_scale},
            {"params": [q.scale.requires_grad_() for q in fitted], "lr": self.lr_activation_scale},
        ]
        scales = Adam([group for group in learned if group["params"]])
        anneal = CosineAnnealingLR(scales, self.steps)
        logits = Adam([r.logits for r in rounding], lr=self.lr_rounding) if rounding else None
        loss = target.new_zeros(())
        for step in job.run.progress(self.steps, f"reconstruct {name}"):
            chosen = torch.randint(len(exact), (min(self.batch_size, len(exact)),), generator=rng).to(exact.device)
            inputs = exact[chosen]
            if self.drop:
                inputs = mix(inputs, quantized[chosen], random_mask(inputs, self.drop, rng))
            loss = _squared_error(run(inputs, chosen), target[chosen])
            beta = annealed(step, self.steps, self.warm_up, self.beta)
            if beta is not None:
                for each in rounding:
                    loss = loss + self.round_weight * each.undecided(beta)
            scales.zero_grad()
            if logits:
                logits.zero_grad()
            loss.backward()
            scales.step()
            if logits:
                logits.step()
            anneal.step()
            with torch.no_grad():  # a scale that reaches zero would never come back
                for group in scales.param_groups:
                    for scale in group["params"]:
                        scale.clamp_(min=1e-12)
        job.run.log(f"reconstruct {name}", self.steps, loss=loss.item())
        return _state(part)


def annealed(step: int, steps: int, warm_up: float, beta: tuple[float, float]) -> float | None:
    """AdaRound's exponent at ``step``: None before the warm-up ends, then linear from ``beta[0]`` to ``beta[1]``.

    >>> annealed(4000, 20000, 0.2, (20.0, 2.0)), annealed(12000, 20000, 0.2, (20.0, 2.0))
    (20.0, 11.0)
    """
    begin = warm_up * steps
    if step < begin:
        return None
    return beta[0] + (beta[1] - beta[0]) * (step - begin) / (steps - begin)


def _squared_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over images and positions of the sum over channels; tokens (N, T, D) have their channels last."""
    squares = (found - wanted).square()
    channels = squares.shape[-1] if squares.dim() == 3 else squares.shape[1]
    return squares.sum() / math.prod(squares.shape) * channels


_Run = Callable[[Tensor, Tensor | slice], Tensor]
"""What a block makes of inputs (n, ...) and their places among all."""


def _run(part: nn.Module, mark: str, tokens: Tensor | None, inputs: Tensor, chosen: Tensor | slice) -> Tensor:
    """The output of ``part``, in which the module ``mark`` hands on ``tokens`` (N, k) alone; None is all."""
    with only_tokens(part, mark, None if tokens is None else tokens[chosen]):
        found: Tensor = part(inputs)
    return found


def _in_batches(run: _Run, images: Tensor, size: int = 64) -> Tensor:
    batches = [slice(first, first + size) for first in range(0, len(images), size)]
    with torch.no_grad():
        return torch.cat([run(images[batch], batch) for batch in batches])


def _state(part: nn.Module) -> dict[str, Any]:
    """What was learned and observed: scales and rounding variables of weights, and the grids of activations."""
    ranges = {name: quantizer.range_state() for name, quantizer in activation_quantizers(part).items()}
    weights = {
        name: {key: value.detach().clone() for key, value in quantizer.state_dict().items() if key in _LEARNED}
        for name, (_, quantizer) in weight_quantizers(part).items()
    }
    return {"weights": weights, "ranges": ranges}


_LEARNED = ("scale", "zero_point", "rounding.logits")


def _install(part: nn.Module, state: dict[str, Any]) -> None:
    """Give ``part`` what was learned, and end the learning: rounding hard, nothing dropped."""
    for name, quantizer in activation_quantizers(part).items():
        quantizer.restore_range(state["ranges"][name])
        quantizer.drop, quantizer.rng, quantizer.ready = 0.0, None, True
    for name, (_, weights) in weight_quantizers(part).items():
        weights.load_state_dict(state["weights"][name], strict=False)
        if isinstance(weights.rounding, LearnedRounding):
            weights.rounding.hard = True
    part.requires_grad_(False)
