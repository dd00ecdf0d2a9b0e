"""Gradient inundation: updates that are large enough for some integers to change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from zsq.core import Recipe, RecipeError, check_counts
from zsq.quant.quantizers import float_weight, weight_quantizers

__all__ = ["Inundation", "inundated"]

_LARGEST = 2.0**30
"""Factor at which a search ends: this update cannot change any integer."""


@dataclass(frozen=True, kw_only=True)
class Inundation(Recipe):
    """Nesterov SGD whose update of each quantized weight is scaled up until enough of its integers change (AIT).

    Only ever up, and only the update: momentum sees the plain gradient. Other parameters learn as usual. The share
    falls with the learning rate, as the papers' schedules have it.
    """

    share: float = 1e-3
    """Least share of the integers of a layer that change in a step, at the first learning rate."""
    probes: int = 5
    """Bisections at most, after the doubling."""
    capped_steps: int = 200
    """Steps at the start in which the factor does not double beyond 100."""
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_counts(self, "probes")
        if not (0 <= self.momentum < 1 and self.weight_decay >= 0 and self.capped_steps >= 0):
            raise RecipeError(f"momentum must lie in [0, 1), and nothing be negative, got {self}")
        if not 0 <= self.share < 1:
            raise RecipeError(f"share must lie in [0, 1), got {self.share}")

    def build(self, student: nn.Module, lr: float) -> Optimizer:
        """The optimizer."""
        layers = [(float_weight(layer), quantizer) for layer, quantizer in weight_quantizers(student).values()]
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        return _InundatedSGD(parameters, lr, self, [(w, q.codes_at) for w, q in layers if w.requires_grad])


class _InundatedSGD(SGD):
    def __init__(
        self,
        parameters: list[nn.Parameter],
        lr: float,
        recipe: Inundation,
        layers: list[tuple[Tensor, Callable[[Tensor], Tensor]]],
    ) -> None:
        super().__init__(
            parameters, lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0
        )
        self._recipe, self._layers, self._first_lr = recipe, layers, lr
        self.param_groups[0]["taken"] = 0  # steps, where a checkpoint keeps them

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        before = [weight.clone() for weight, _ in self._layers]
        result = super().step(closure)
        group = self.param_groups[0]
        share = self._recipe.share * group["lr"] / self._first_lr
        cap = 100.0 if group["taken"] < self._recipe.capped_steps else _LARGEST
        group["taken"] += 1
        for (weight, codes), old in zip(self._layers, before, strict=True):
            if weight.grad is None:
                continue
            # not weight - old: of a small step, rounding leaves no direction
            direction = weight.grad.add(old, alpha=group["weight_decay"])
            if group["momentum"]:
                direction.add_(self.state[weight]["momentum_buffer"], alpha=group["momentum"])
            update = direction.mul_(-group["lr"])
            factor = inundated(old, update, codes, share, self._recipe.probes, cap)
            if factor != 1:
                weight.copy_(old.add_(update, alpha=factor))
        return result


def inundated(
    weight: Tensor, update: Tensor, codes: Callable[[Tensor], Tensor], share: float, probes: int, cap: float = _LARGEST
) -> float:
    """The factor of ``update`` with which at least ``share`` of the integers ``codes(weight)`` change, 1 at least.

    Doubles until enough change, then bisects ``probes`` times at most and keeps the last factor tried, which may lie
    just below the share. Beyond ``cap`` it stops doubling. An update that can change nothing keeps 1.
    """
    if not update.any():
        return 1.0
    now = codes(weight)

    def changed(factor: float) -> float:
        return (codes(weight + factor * update) != now).float().mean().item()

    found, factor = changed(1.0), 1.0
    while found < share and factor <= cap:
        factor *= 2
        found = changed(factor)
        if factor > _LARGEST:
            return 1.0
    if factor == 1:
        return 1.0
    low, high = factor / 2, factor
    for _ in range(probes):
        factor = (low + high) / 2
        found = changed(factor)
        if abs(found - share) < share / 100:
            break
        low, high = (factor, high) if found < share else (low, factor)
    return factor
