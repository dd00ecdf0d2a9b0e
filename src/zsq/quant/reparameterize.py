"""Reparameterize: one grid where each channel had its own, with the difference moved into the layers on both sides."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from zsq.core import Job, Recipe, Source
from zsq.nets.folding import count_readers
from zsq.nets.graph import module_of
from zsq.quant.grid import Affine, PerTensor, Scheme
from zsq.quant.layers import complete
from zsq.quant.placement import normalized_linears
from zsq.quant.quantizers import ActivationQuantizer, float_weight, refit

__all__ = ["Reparameterize"]


@dataclass(frozen=True, kw_only=True)
class Reparameterize(Recipe):
    """RepQ-ViT (Li et al., ICCV 2023): channel grids behind a LayerNorm become one, the float function stays.

    S is the mean of the scales s of the channels and Z that of their zero points z, rounded; r = s / S. The LayerNorm
    then puts out x' = x / r + (z - Z) S: gamma' = gamma / r, beta' = beta / r + (z - Z) S. The linears that read it
    get W' = W r and bias' = bias - W' (z - Z) S, and their weights are fitted to grids anew. Because Z is rounded
    first, which the released code leaves out, every code is the one that its channel had.
    """

    def apply(self, job: Job, source: Source) -> None:
        """Change ``job.student`` in place; its channel grids must be set. Where layers are shared, they stay."""
        graph = job.student
        counts = count_readers(graph)
        for node in list(graph.graph.nodes):
            linears = normalized_linears(node)
            quantizers = _between(node, linears)
            layers = [module_of(each) for each in (node, *linears)]
            alone = all(counts[id(parameter)] == 1 for layer in layers if layer for parameter in layer.parameters())
            if linears and len(quantizers) == 1 and quantizers[0].scale.dim() == 1 and alone:
                self._merge(graph, str(node.target), quantizers[0], [str(each.target) for each in linears])

    def _merge(self, graph: fx.GraphModule, norm: str, quantizer: ActivationQuantizer, linears: list[str]) -> None:
        scales, zero_points = quantizer.scale.detach().double(), quantizer.zero_point.double()
        scale, zero_point = scales.mean(), zero_points.mean().round()
        factors, shift = scales / scale, (zero_points - zero_point) * scale  # (C,)
        complete(graph, norm)
        layer = graph.get_submodule(norm)
        with torch.no_grad():
            for parameter, change in ((layer.weight, 0.0), (layer.bias, shift)):
                assert isinstance(parameter, Tensor)
                parameter.copy_(parameter.double() / factors + change)
        for name in linears:
            complete(graph, name)
            _absorb(graph.get_submodule(name), factors, shift)
        symmetric = isinstance(quantizer.scheme, Scheme) and quantizer.scheme.symmetric
        quantizer.scheme = Scheme(symmetric=symmetric, granularity=PerTensor())
        quantizer.set_grid(Affine(scale, zero_point, quantizer.low, quantizer.high))


def _between(node: fx.Node, linears: list[fx.Node]) -> list[ActivationQuantizer]:
    """The quantizers that lie between a LayerNorm and the ``linears`` that read it, if every way leads through one."""
    found: dict[ActivationQuantizer, None] = {}
    for linear in linears:
        source = linear.all_input_nodes[0]
        on_way = []
        while source is not node:
            if isinstance(module := module_of(source), ActivationQuantizer):
                on_way.append(module)
            source = source.all_input_nodes[0]
        if len(on_way) != 1:
            return []
        found[on_way[0]] = None
    return list(found)


def _absorb(linear: nn.Module, factors: Tensor, shift: Tensor) -> None:
    """Let ``linear`` read x / factors + shift where it read x (.., C), in place, and fit its weight anew."""
    weight, bias = float_weight(linear), linear.bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        scaled = weight.double() * factors
        weight.copy_(scaled)
        bias.copy_(bias.double() - scaled @ shift)
    refit(linear)
