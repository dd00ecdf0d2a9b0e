"""Layers between which channels can be scaled without a change of the function: W2 f(W1 x) = (W2 S) f(S^-1 W1 x)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from zsq.nets.clip import ChannelClip
from zsq.nets.folding import count_readers, output_first, store, why_fixed
from zsq.nets.graph import layers, module_of, preserves_value
from zsq.nets.tracing import LAYERS, Layer, asks_size

__all__ = [
    "Chain",
    "ChannelClip",
    "Link",
    "clip_limit",
    "clip_limits",
    "equalizable_chains",
    "make_equivariant",
    "scale_channels",
]


@dataclass(frozen=True)
class Link:
    """Two layers, between which each channel may be scaled down and up again."""

    first: str
    """Dotted name of the layer whose outputs are scaled."""
    second: str
    """Dotted name of the layer whose inputs are scaled."""
    between: tuple[str, ...]
    """Names of the nodes from the one to the other, in order."""
    clip: str | None
    """The one of them that clips: it scales only as a ``ChannelClip``, which ``make_equivariant`` puts there."""


@dataclass(frozen=True)
class Chain:
    """Layers in a row, each linked to the next."""

    links: tuple[Link, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Dotted names, from the first to the last."""
        return (self.links[0].first, *(link.second for link in self.links))


def equalizable_chains(graph: fx.GraphModule) -> list[Chain]:
    """The longest rows of layers of a folded graph whose channels may be scaled from each layer to the next.

    Between two of them lie only ReLU, LeakyReLU, PReLU, ReLU6, identity, average pooling, zero padding, and flattening
    after global pooling, with one reader each. A grouped convolution that is not depthwise may open a chain, and does
    not continue one.
    """
    counts = count_readers(graph)
    free = [node for node in layers(graph) if why_fixed(node, counts) is None]
    links = {
        link.first: link for node in free if (link := _link(node)) and link.second in {str(n.target) for n in free}
    }
    reached = {link.second for link in links.values()}
    chains = []
    for name in links:
        if name not in reached:
            row = [links[name]]
            while row[-1].second in links:
                row.append(links[row[-1].second])
            chains.append(Chain(tuple(row)))
    return chains


def make_equivariant(graph: fx.GraphModule, exact: bool = True) -> None:
    """Replaces, in place, the clips between chain members: by a ``ChannelClip`` at the same value, or by ReLU.

    ReLU is what published codes use; it changes the function where a value exceeds the clip.
    """
    links = {link.clip: link for chain in equalizable_chains(graph) for link in chain.links if link.clip is not None}
    calls = [node.target for node in graph.graph.nodes]
    for node in graph.graph.nodes:
        limit = clip_limit(node)
        if node.name not in links or limit is None:
            continue
        first = graph.get_submodule(links[node.name].first)
        assert isinstance(first, LAYERS)
        channels = len(output_first(first, first.weight))
        clip = ChannelClip(first.weight.new_full((channels,), limit)) if exact else nn.ReLU()
        if node.op != "call_module" or calls.count(node.target) > 1:
            # Its own module, and the same node: blocks and readers know it.
            node.op, node.target = "call_module", f"{node.meta['module_path']}.{node.name}_clip".lstrip(".")
            node.args, node.kwargs = node.args[:1], {}
        graph.add_submodule(str(node.target), clip)
    graph.recompile()


def scale_channels(first: Layer, second: Layer, clip: nn.Module | None, factors: Tensor) -> None:
    """Divides, in place, the outputs of ``first`` by ``factors`` (C,) > 0 and multiplies the inputs of ``second``.

    ``clip`` is what lies between the two, if that is a ``ChannelClip``; its limits are divided too. Any groups.
    """
    with torch.no_grad():
        weight, bias = output_first(first, first.weight), first.bias
        store(first, weight / factors.reshape(-1, *[1] * (weight.dim() - 1)), None if bias is None else bias / factors)
        weight = output_first(second, second.weight)
        groups = getattr(second, "groups", 1)
        per_group = weight.unflatten(0, (groups, -1))  # (groups, O / groups, I / groups, *kernel)
        scale = factors.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
        store(second, (per_group * scale).flatten(0, 1), second.bias)
        if isinstance(clip, ChannelClip):
            clip.limit /= factors


_POINTWISE = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
_POINTWISE_CALLS = {F.relu, torch.relu, "relu", F.leaky_relu, F.prelu, torch.prelu, "prelu"}
_SPATIAL = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_SPATIAL_CALLS = {
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
}
_RESHAPES = {torch.flatten, torch.reshape, torch.squeeze, "flatten", "reshape", "squeeze", "view"}


def _link(node: fx.Node) -> Link | None:
    """The link from the layer ``node`` to the next one, if they are linked."""
    linear = isinstance(module_of(node), nn.Linear)
    between: list[str] = []
    clip, value = None, node
    while len(readers := [user for user in value.users if not asks_size(user)]) == 1:
        (reader,) = readers
        layer = module_of(reader)
        if isinstance(layer, LAYERS):
            groups = getattr(layer, "groups", 1)
            if isinstance(layer, nn.Linear):
                fits = linear or len(value.meta["shape"]) == 2
            else:
                fits = not linear and (groups == 1 or groups == layer.in_channels == layer.out_channels)
            return Link(str(node.target), str(reader.target), tuple(between), clip) if fits else None
        if isinstance(layer, ChannelClip) or clip_limit(reader) is not None:
            # A clip for each channel needs dimension 1 to be the channels, and one factor can move only one clip.
            if clip is not None or (linear and len(value.meta["shape"]) > 2):
                return None
            clip = reader.name
        elif not _keeps_channels(reader, value, linear):
            return None
        between.append(reader.name)
        value = reader
    return None


def _keeps_channels(node: fx.Node, value: fx.Node, linear: bool) -> bool:
    """Whether each channel of ``node`` is made of the same channel of ``value``, and is scaled if that is.

    After a ``linear`` the channels are the last dimension, so that only what acts on each number counts.
    """
    module = module_of(node)
    if preserves_value(node) or type(module) in _POINTWISE or node.target in _POINTWISE_CALLS:
        return node.args[0] is value
    before, after = value.meta["shape"], node.meta.get("shape")
    if linear or after is None:
        return False
    if isinstance(module, nn.Flatten) or node.target in _RESHAPES:
        return bool(after == before[:2] and math.prod(before[2:]) == 1)
    if node.target in (torch.mean, "mean"):
        dims = _arguments(node, "input", "dim").get("dim")
        return dims is not None and all(dim % len(before) > 1 for dim in ([dims] if isinstance(dims, int) else dims))
    if node.target is F.pad:
        given = _arguments(node, "input", "pad", "mode", "value")
        zero = given.get("mode", "constant") == "constant" and not given.get("value")
        return zero and len(given["pad"]) <= 2 * (len(before) - 2)
    return type(module) in _SPATIAL or node.target in _SPATIAL_CALLS


def clip_limit(node: fx.Node) -> float | None:
    """The upper limit, if ``node`` clips to [0, limit]."""
    module = module_of(node)
    low: Any
    high: Any
    if isinstance(module, nn.Hardtanh) and type(module) in (nn.ReLU6, nn.Hardtanh):
        low, high = module.min_val, module.max_val
    elif node.target is F.relu6:
        low, high = 0.0, 6.0
    elif node.target is F.hardtanh:
        given = {"min_val": -1.0, "max_val": 1.0, **_arguments(node, "input", "min_val", "max_val")}
        low, high = given["min_val"], given["max_val"]
    elif node.target in (torch.clamp, torch.clip, "clamp", "clip"):
        given = _arguments(node, "input", "min", "max")
        low, high = given.get("min"), given.get("max")
    else:
        return None
    return float(high) if low == 0 and isinstance(high, (int, float)) else None


def clip_limits(node: fx.Node) -> tuple[float, float] | None:
    """The two ends between which ``node`` clips, if that is all it does; those of a ReLU are 0 and infinity."""
    module, limit = module_of(node), clip_limit(node)
    if limit is not None:
        return 0.0, limit
    if isinstance(module, nn.Hardtanh):
        return float(module.min_val), float(module.max_val)
    if isinstance(module, nn.ReLU) or node.target in (F.relu, torch.relu, "relu", "relu_"):
        return 0.0, math.inf
    return None


def _arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments of a call by name, as ``names`` order them."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}
