"""Passes that move magnitude and bias between layers without an image: equalization, absorption, bias correction."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from zsq.core import Job, Recipe, RecipeError, Source, check_counts
from zsq.nets.chains import Link, equalizable_chains, make_equivariant, scale_channels
from zsq.nets.folding import Moments, output_first
from zsq.nets.graph import layers, module_of
from zsq.nets.tracing import LAYERS
from zsq.quant.layers import complete, fold
from zsq.quant.moments import spreads, through_layer
from zsq.quant.placement import is_activation
from zsq.quant.quantizers import float_weight, weight_quantizer

__all__ = ["AbsorbBiases", "CorrectBiases", "EqualizeLayers"]


@dataclass(frozen=True, kw_only=True)
class EqualizeLayers(Recipe):
    """Cross-layer equalization: scale each channel so that the layers on both sides have the same range of weights.

    s_i = sqrt(r1_i / r2_i) with r = max |w| over output channel i of the first and input channel i of the second
    layer, swept over all pairs until nothing moves; chains through depthwise layers converge to the cube-root
    solution. The function of the network is unchanged. Folds BatchNorm first.
    """

    exact_clip: bool = True
    """Give every channel its own ReLU6 limit, 6 / s_i; otherwise ReLU6 becomes ReLU, as in the released codes."""
    sweeps: int = 100
    """Most sweeps over all pairs."""
    tolerance: float = 1e-7
    """Stop when no factor differs from 1 by more."""

    def __post_init__(self) -> None:
        check_counts(self, "sweeps")

    def apply(self, job: Job, source: Source) -> None:
        """Change ``job.student`` in place."""
        graph = job.student
        fold(graph)
        chains = equalizable_chains(graph)
        make_equivariant(graph, exact=self.exact_clip)
        graph.meta.setdefault("edits", []).append(["equivariant", self.exact_clip])
        links = [link for chain in chains for link in chain.links]
        for _ in range(self.sweeps):
            moved = max((_equalize(graph, link) for link in links), default=0.0)
            if moved <= self.tolerance:
                break


@dataclass(frozen=True, kw_only=True)
class AbsorbBiases(Recipe):
    """Move what keeps a unit always on into the next layer's bias: c = max(0, beta - ``sigmas`` |gamma|).

    Exact up to the tail beyond ``sigmas`` and up to zero padding, where a border position reads 0 instead of c.
    Only through ReLU and links without an activation (c = beta there); a clipped channel is left alone.
    """

    sigmas: float = 3.0
    """Standard deviations below the mean that still count as always on."""

    def __post_init__(self) -> None:
        if self.sigmas < 0:
            raise RecipeError(f"sigmas cannot be negative, got {self.sigmas}")

    def apply(self, job: Job, source: Source) -> None:
        """Change ``job.student`` in place."""
        graph = job.student
        moments: dict[str, Moments] = graph.meta.get("moments", {})
        for chain in equalizable_chains(graph):
            for link in chain.links:
                if link.first in moments:
                    self._absorb(graph, link, moments)

    def _absorb(self, graph: fx.GraphModule, link: Link, moments: dict[str, Moments]) -> None:
        first, second = graph.get_submodule(link.first), graph.get_submodule(link.second)
        kept = moments[link.first]
        nodes = {node.name: node for node in graph.graph.nodes}
        clips = [nodes[name] for name in link.between if _bends(nodes[name])]
        surplus = (kept.mean - self.sigmas * kept.std).clamp(min=0) if clips else kept.mean
        if first.bias is None or second.bias is None or link.clip is not None:
            return
        with torch.no_grad():
            first.bias -= surplus  # type: ignore[operator]  # a Parameter
            second.bias += through_layer(second, surplus)  # type: ignore[operator]  # as above
        moments[link.first] = Moments(mean=kept.mean - surplus, std=kept.std)


@dataclass(frozen=True, kw_only=True)
class CorrectBiases(Recipe):
    """Analytic bias correction: take the mean that weight rounding adds, eps E[x], out of every bias.

    E[x] comes from the moments that BatchNorm fixed, through the activations in closed form; the network input has
    mean 0. The kept moments stay: the correction brings the output back to them.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"bn"})

    def apply(self, job: Job, source: Source) -> None:
        """Change ``job.student`` in place; its weights must be quantized already."""
        graph = job.student
        known = spreads(graph, job.pixel_range, sigmas=6.0)
        for node in layers(graph):
            layer = graph.get_submodule(str(node.target))
            if weight_quantizer(layer) is None:
                continue
            error = (_weight(layer) - float_weight(layer)).detach()
            shift = through_layer(layer, known[node.all_input_nodes[0]].mean, weight=error)
            complete(graph, str(node.target))
            with torch.no_grad():
                layer.bias -= shift  # type: ignore[operator]  # a Parameter


def _equalize(graph: fx.GraphModule, link: Link) -> float:
    """Equalize one pair in place; returns the largest |log s|."""
    first, second = graph.get_submodule(link.first), graph.get_submodule(link.second)
    factors = equalizing_factors(_output_range(first), _input_range(second))
    clip = graph.get_submodule(clip_target(graph, link)) if link.clip else None
    assert isinstance(first, LAYERS)
    assert isinstance(second, LAYERS)
    scale_channels(first, second, clip, factors)
    moments = graph.meta["moments"]
    if link.first in moments:
        kept = moments[link.first]
        moments[link.first] = Moments(mean=kept.mean / factors, std=kept.std / factors)
    return float(factors.log().abs().max())


def equalizing_factors(first: Tensor, second: Tensor) -> Tensor:
    """s = sqrt(r1 / r2), and 1 where a channel is dead on either side.

    >>> equalizing_factors(torch.tensor([8.0, 0.5]), torch.tensor([2.0, 2.0])).tolist()
    [2.0, 0.5]
    """
    factors = (first / second).sqrt()
    usable = (first > 1e-12) & (second > 1e-12) & factors.isfinite()
    return torch.where(usable, factors, 1.0)


def clip_target(graph: fx.GraphModule, link: Link) -> str:
    """The dotted name of the module that clips between the two layers of ``link``."""
    return next(str(node.target) for node in graph.graph.nodes if node.name == link.clip)


def _output_range(layer: nn.Module) -> Tensor:
    assert isinstance(layer, LAYERS)
    return output_first(layer, layer.weight.detach()).flatten(1).abs().amax(1)


def _input_range(layer: nn.Module) -> Tensor:
    assert isinstance(layer, LAYERS)
    weight = output_first(layer, layer.weight.detach())  # (O, I / groups, *kernel)
    if getattr(layer, "groups", 1) == 1:
        weight = weight.movedim(1, 0)
    return weight.flatten(1).abs().amax(1)  # depthwise: the one output channel of each


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _bends(node: fx.Node) -> bool:
    return is_activation(node) or module_of(node) is None
