"""BatchNorm folded into the layers before it, and what may be done to the weights of a layer on its own."""

import copy
import math
import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from zsq.core.errors import UnsupportedModel
from zsq.nets.graph import consumers, module_of, producer
from zsq.nets.tracing import LAYERS, Layer

__all__ = ["Moments", "count_readers", "fold_batchnorm", "fold_batchnorms", "output_first", "store", "why_fixed"]


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation (C,) of each channel of a layer's output, as the BN folded into it fixes them."""

    mean: Tensor
    std: Tensor


def fold_batchnorm(weight: Tensor, bias: Tensor | None, bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The weight (O, I, *kernel) and bias (O,) of one layer that computes ``bn(layer(x))``.

    Exact in eval mode: W * g / sqrt(v + eps), (b - m) * g / sqrt(v + eps) + beta.

    Raises:
        UnsupportedModel: if ``bn`` keeps no running statistics.

    >>> bn = nn.BatchNorm2d(2).eval()
    >>> fold_batchnorm(torch.ones(2, 1, 1, 1), None, bn)[1].tolist()
    [0.0, 0.0]
    """
    if bn.running_mean is None or bn.running_var is None:
        raise UnsupportedModel("cannot fold a BatchNorm without running statistics: it depends on the batch")
    mean, var = bn.running_mean.double(), bn.running_var.double()  # a small variance makes a large factor
    gamma = torch.ones_like(mean) if bn.weight is None else bn.weight.detach().double()
    beta = torch.zeros_like(mean) if bn.bias is None else bn.bias.detach().double()
    factor = gamma / (var + bn.eps).sqrt()
    shift = ((0 if bias is None else bias.double()) - mean) * factor + beta
    return (weight.double() * _per_output(factor, weight)).to(weight.dtype), shift.to(weight.dtype)


def fold_batchnorms(graph: fx.GraphModule) -> dict[str, Moments]:
    """Folds, in place, each BN of a captured graph into the layer that alone feeds it; what it fixed, by layer name.

    A BN that cannot be folded stays, and ``graph.meta["unfolded"]`` maps its dotted name to the reason.
    """
    moments: dict[str, Moments] = {}
    unfolded: dict[str, str] = {}
    counts = count_readers(graph)
    for node in list(graph.graph.nodes):
        bn = module_of(node)
        if not isinstance(bn, _BatchNorm):
            continue
        source = producer(node)
        obstacle = _obstacle(node, source, counts)
        if obstacle is not None:
            unfolded[str(node.target)] = obstacle
            continue
        layer = module_of(source)
        assert isinstance(layer, LAYERS)
        assert bn.running_mean is not None
        store(layer, *fold_batchnorm(output_first(layer, layer.weight.detach()), _bias(layer), bn))
        mean = torch.zeros_like(bn.running_mean) if bn.bias is None else bn.bias.detach().clone()
        std = torch.ones_like(mean) if bn.weight is None else bn.weight.detach().abs()  # a deviation has no sign
        moments[str(source.target)] = Moments(mean=mean, std=std)
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.graph.erase_node(node)
        # An activation that lived inside the BN keeps its dotted name.
        graph.set_submodule(str(node.target), nn.ModuleDict(dict(bn.named_children())))
    graph.delete_all_unused_submodules()
    graph.recompile()
    graph.meta["unfolded"] = unfolded
    return moments


def _obstacle(node: fx.Node, source: fx.Node, counts: Counter[int]) -> str | None:
    bn, layer = module_of(node), module_of(source)
    assert isinstance(bn, _BatchNorm)
    if not isinstance(layer, LAYERS):
        return f"its input comes from {source.target if source.op == 'call_module' else source.name}, which is no layer"
    if consumers(source) != [node]:
        return f"what {source.target} computes is also read elsewhere"
    if bn.running_mean is None or bn.training:
        return "it normalises by the statistics of the batch"
    if not type(bn).forward.__module__.startswith("torch.nn.modules."):
        return f"{type(bn).__name__} changes what a BatchNorm computes"
    if any(counts[id(parameter)] > 1 for parameter in bn.parameters(recurse=False)) or counts[id(bn)] > 1:
        return "it runs more than once"
    if isinstance(layer, nn.Linear) and len(source.meta["shape"]) != 2:
        return f"it does not normalise the features of {source.target}"
    return why_fixed(source, counts)


def count_readers(graph: fx.GraphModule) -> Counter[int]:
    """How many nodes read each parameter and each module, by ``id``."""
    counts: Counter[int] = Counter()
    for node in graph.graph.nodes:
        if (module := module_of(node)) is not None:
            counts.update([id(module), *map(id, module.parameters())])
        elif node.op == "get_attr":
            counts[id(operator.attrgetter(str(node.target))(graph))] += 1
    return counts


def why_fixed(node: fx.Node, counts: Counter[int]) -> str | None:
    """Why the weights of a layer cannot be changed to change the channels of its output as they do."""
    layer = module_of(node)
    assert isinstance(layer, LAYERS)
    if any(counts[id(parameter)] > 1 for parameter in layer.parameters()):
        return f"the weights of {node.target} are used more than once"
    if "weight" not in layer._parameters:
        return f"the weight of {node.target} is computed from other parameters"
    if type(layer).__module__.startswith("torch.nn.modules."):
        return None
    # A subclass may do anything with its weight, such as standardise it: see whether it scales and shifts as a layer.
    changed, inputs = copy.deepcopy(layer), node.all_input_nodes[0].meta["shape"]
    with torch.no_grad():
        images = torch.linspace(-1, 1, math.prod(inputs)).reshape(inputs).to(layer.weight)
        before, weight = layer(images), output_first(layer, layer.weight)
        factor = torch.linspace(0.5, 2, len(weight)).to(weight)
        shift = factor - 1
        bias = _bias(layer)
        store(changed, weight * _per_output(factor, weight), shift if bias is None else bias * factor + shift)
        features = (-1,) if isinstance(layer, nn.Linear) else (-1, *[1] * (before.dim() - 2))
        error = changed(images) - (before * factor.reshape(features) + shift.reshape(features))
    if error.abs().max() <= 1e-4 * before.abs().max():
        return None
    return f"{type(layer).__name__} {node.target} is not linear in its weight"


def _bias(layer: Layer) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach()


def _per_output(values: Tensor, weight: Tensor) -> Tensor:
    """``values`` (O,), shaped to multiply ``weight`` (O, I, *kernel)."""
    return values.reshape(-1, *[1] * (weight.dim() - 1))


def output_first(layer: Layer, weight: Tensor) -> Tensor:
    """The weight of ``layer`` as (O, I / groups, *kernel), and back: transposed convolutions keep (I, O / groups)."""
    if not isinstance(layer, _ConvTransposeNd):
        return weight
    grouped: Tensor = weight.unflatten(0, (layer.groups, -1))
    return grouped.transpose(1, 2).flatten(0, 1)


def store(layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
    """Sets the weight (O, I / groups, *kernel) and the bias (O,) of ``layer``, which gets one if it has none."""
    with torch.no_grad():
        layer.weight.copy_(output_first(layer, weight))
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
        elif bias is not None:
            layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=layer.weight.requires_grad)
