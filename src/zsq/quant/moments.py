"""Moments of activations in closed form, from what BatchNorm fixed: means, variances and ranges without an image."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd

from zsq.core import Job, Recipe, RecipeError, Source
from zsq.nets.chains import clip_limits
from zsq.nets.clip import ChannelClip
from zsq.nets.folding import output_first
from zsq.nets.graph import layers, module_of
from zsq.nets.tracing import LAYERS
from zsq.quant.quantizers import ActivationQuantizer, float_weight

__all__ = ["BNRanges", "Spread", "clipped_normal", "spreads"]


@dataclass(frozen=True)
class Spread:
    """What is known of a tensor, channel by channel (C,): mean, variance, and the ends of its values."""

    mean: Tensor
    var: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True, kw_only=True)
class BNRanges(Recipe):
    """Set activation ranges to the ``sigmas``-fold standard deviation around the mean that BatchNorm fixed (DFQ)."""

    sigmas: float = 6.0
    """Standard deviations on either side."""

    needs: ClassVar[frozenset[str]] = frozenset({"bn"})

    def __post_init__(self) -> None:
        if self.sigmas <= 0:
            raise RecipeError(f"sigmas must be positive, got {self.sigmas}")

    def apply(self, job: Job, source: Source) -> None:
        """Change ``job.student`` in place."""
        known = spreads(job.student, job.pixel_range, self.sigmas)
        for node in job.student.graph.nodes:
            quantizer = module_of(node)
            if isinstance(quantizer, ActivationQuantizer):
                spread = known[node]
                low, high = spread.low.min().clamp(max=0), spread.high.max().clamp(min=0)
                if quantizer.scheme.symmetric and low < 0:
                    high = torch.maximum(-low, high)
                    low = -high
                quantizer.set_range(low, high, signed=bool(low < 0))


def clipped_normal(mean: Tensor, var: Tensor, low: Tensor | float, high: Tensor | float) -> tuple[Tensor, Tensor]:
    """Mean and variance of a normal variable clipped to ``low .. high`` (ReLU: 0 and infinity).

    With a = (low - m) / s, b = (high - m) / s: E[x] = m (Phi(b) - Phi(a)) + s (phi(a) - phi(b)) + low Phi(a)
    + high (1 - Phi(b)), and E[x^2] likewise. A constant (variance 0) is clipped as it is.
    """
    m, s = mean.double(), var.double().clamp(min=1e-24).sqrt()
    ends = [torch.as_tensor(end, dtype=torch.float64, device=m.device).expand_as(m) for end in (low, high)]
    a, b = ((end - m) / s for end in ends)
    below, above = _cdf(a), 1 - _cdf(b)
    inside = (1 - below - above).clamp(min=0)
    first = m * inside + s * (_pdf(a) - _pdf(b)) + _times(ends[0], below) + _times(ends[1], above)
    # integral of x^2 over the inside of a normal: (m^2 + s^2) P + s ((m + low) phi(a) - (m + high) phi(b))
    second = (m * m + s * s) * inside + s * (_times(m + ends[0], _pdf(a)) - _times(m + ends[1], _pdf(b)))
    second = second + _times(ends[0].square(), below) + _times(ends[1].square(), above)
    return first.to(mean.dtype), (second - first.square()).clamp(min=0).to(mean.dtype)


def spreads(graph: fx.GraphModule, pixel_range: tuple[float, float], sigmas: float) -> dict[fx.Node, Spread]:
    """What every tensor of a folded graph looks like, from the moments that folding kept.

    A layer with a folded BatchNorm has its moments; another one passes on those of its input, as independent channels.
    Sums add means and variances, concatenation concatenates, averages keep the mean. A normalised image has mean 0
    and variance 1.
    """
    known: dict[fx.Node, Spread] = {}
    of_layers = set(layers(graph))
    for node in graph.graph.nodes:
        if "shape" not in node.meta or node.op in ("output", "get_attr"):
            continue
        inputs = [known[source] for source in node.all_input_nodes if source in known]
        if node.op == "placeholder":
            zero = torch.zeros(node.meta["shape"][1], device=next(graph.parameters()).device)
            known[node] = Spread(zero, zero + 1, zero + pixel_range[0], zero + pixel_range[1])
        elif node in of_layers:
            known[node] = _after_layer(graph, node, inputs[0], sigmas)
        elif inputs:
            known[node] = _after(node, inputs, sigmas)
    return known


def _after_layer(graph: fx.GraphModule, node: fx.Node, x: Spread, sigmas: float) -> Spread:
    kept = graph.meta.get("moments", {}).get(str(node.target))
    if kept is not None:
        return _normal(kept.mean, kept.std.square(), sigmas)
    layer = graph.get_submodule(str(node.target))
    mean, var = (through_layer(layer, value, power) for value, power in ((x.mean, 1), (x.var, 2)))
    bias = layer.bias
    return _normal(mean if bias is None else mean + bias.detach(), var, sigmas)  # type: ignore[operator]  # a Tensor


def through_layer(layer: nn.Module, x: Tensor, power: int = 1, weight: Tensor | None = None) -> Tensor:
    """sum_i of the kernel sum of W_oi^power times x_i, (O,), without bias; ``x`` (I,) is constant over positions.

    A transposed convolution is averaged over its output positions, each of which sees another part of the kernel.
    """
    assert isinstance(layer, LAYERS)
    w = output_first(layer, (float_weight(layer) if weight is None else weight).detach() ** power)
    flat = w.flatten(2).sum(2) if w.dim() > 2 else w  # (O, I / groups)
    if isinstance(layer, _ConvTransposeNd):
        flat = flat / math.prod(layer.stride)
    groups = getattr(layer, "groups", 1)
    if groups == 1 and flat.shape[1] != len(x):  # a flattened map: every position of a channel has its moments
        x = x.repeat_interleave(flat.shape[1] // len(x))
    shifted: Tensor = flat.unflatten(0, (groups, -1)) @ x.view(groups, -1, 1)
    return shifted.flatten()


def _after(node: fx.Node, inputs: list[Spread], sigmas: float) -> Spread:
    x, module = inputs[0], module_of(node)
    if isinstance(module, ChannelClip):
        return _clip(x, 0.0, module.limit)
    limits = clip_limits(node)
    if limits is not None:
        return _clip(x, *limits)
    if node.target in (operator.add, operator.iadd, torch.add, "add", "add_") and len(inputs) == 2:
        return _normal(x.mean + inputs[1].mean, x.var + inputs[1].var, sigmas)
    if node.target in (torch.cat, torch.concat):
        return Spread(*(torch.cat([getattr(s, part) for s in inputs]) for part in ("mean", "var", "low", "high")))
    monotone = _monotone(node, module)
    if monotone is not None:  # a smooth activation: the ends move with it, the mean to first order
        bent = [monotone(value) for value in (x.mean, x.low, x.high)]
        lowest = torch.minimum(torch.minimum(bent[1], bent[2]), torch.full_like(x.low, -0.3))  # SiLU's dip is -0.28
        return Spread(bent[0], x.var, lowest, torch.maximum(bent[1], bent[2]))
    return x  # views, pools, dropout, quantizers: neither mean nor ends move


def _normal(mean: Tensor, var: Tensor, sigmas: float) -> Spread:
    reach = sigmas * var.sqrt()
    return Spread(mean, var, mean - reach, mean + reach)


def _clip(x: Spread, low: float, high: float | Tensor) -> Spread:
    mean, var = clipped_normal(x.mean, x.var, low, high)
    top = torch.as_tensor(high, dtype=x.high.dtype, device=x.high.device)
    return Spread(mean, var, x.low.clamp(min=low).minimum(top), x.high.clamp(min=low).minimum(top))


_SMOOTH_MODULES = (nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid, nn.LeakyReLU, nn.ELU, nn.Tanh, nn.Mish)
_SMOOTH_FUNCTIONS = {F.silu, F.gelu, F.hardswish, F.sigmoid, F.hardsigmoid, torch.sigmoid, torch.tanh}


def _monotone(node: fx.Node, module: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    if isinstance(module, _SMOOTH_MODULES):
        return module
    if node.target in _SMOOTH_FUNCTIONS and callable(node.target):
        return node.target
    return None


def _pdf(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _cdf(x: Tensor) -> Tensor:
    share: Tensor = torch.special.ndtr(x)
    return share


def _times(a: Tensor, b: Tensor) -> Tensor:
    """``a * b`` where infinity times zero is zero: an end at infinity carries no mass."""
    return torch.where(b == 0, torch.zeros_like(b), a * b)
