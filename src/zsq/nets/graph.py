"""Networks as graphs: capture, and what can be asked of a graph."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq.core.errors import UnsupportedModel
from zsq.nets.blocks import Block, blocks, extract, mark_blocks
from zsq.nets.landmarks import landmarks
from zsq.nets.nodes import (
    Matmul,
    consumers,
    hidden_layers,
    is_matmul,
    layers,
    matmuls,
    module_of,
    preserves_value,
    producer,
)
from zsq.nets.simplify import Sizes, functionalize, simplify
from zsq.nets.tracing import LayerTracer, Untraceable, is_layer, prepare

__all__ = [
    "Block",
    "Matmul",
    "blocks",
    "capture",
    "consumers",
    "extract",
    "hidden_layers",
    "is_matmul",
    "layers",
    "matmuls",
    "module_of",
    "preserves_value",
    "producer",
]

_TOLERANCE = 1e-5
"""Largest difference of a capture from its network, relative to the largest output."""
_ROUNDING = 1e-2
"""Above it, a difference is no rounding."""


class _Whole(nn.Module):
    """A network as the only layer of another one."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root

    def forward(self, images: Tensor) -> Any:
        return self.root(images)


def capture(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """A copy of ``model`` in eval mode as a graph from images (N, C, H, W) of the size of ``example`` to logits (N, K).

    Every torch layer is a node under its own dotted name. N is free, H and W are those of ``example``. A module that
    cannot be traced is a node too, and ``graph.meta["untraced"]`` maps its dotted name to the reason (``"root"``, if
    the network as a whole cannot). In ``node.meta`` are

    - ``"module_path"``: the dotted path of the innermost module, other than a layer, whose code made the node;
    - ``"shape"``: of its tensor, for ``example``; missing where the value is no tensor;
    - ``"block"``: what ``blocks`` reads;

    and in ``graph.meta["landmarks"]`` where to look for features and maps.

    Raises:
        UnsupportedModel: if ``model`` does not return one tensor, or the graph does not compute what ``model`` does.
    """
    original = copy.deepcopy(model).eval()
    one = example[:1].detach().clone()
    batches = one, torch.cat([one, one.flip(-1)])
    nodes, network, untraced = _trace(prepare(copy.deepcopy(original)), batches)
    graph = simplify(nodes, network, batches)
    graph.meta["untraced"] = untraced
    for batch in batches:
        _verify(graph, original, batch)
    sizes = Sizes(graph)
    sizes.run(example)
    for node, shape in sizes.shapes.items():
        node.meta["shape"] = shape
    mark_blocks(graph, network)
    graph.meta["landmarks"] = landmarks(graph)
    return graph.eval()


def _trace(network: nn.Module, batches: tuple[Tensor, Tensor]) -> tuple[fx.Graph, nn.Module, dict[str, str]]:
    """The nodes, the module whose names they use, and the reason for each module that had to become a layer."""
    untraced: dict[str, str] = {}
    if is_layer(network):
        network = _Whole(network).eval()
    while True:
        try:
            nodes = LayerTracer(batches, untraced).trace(network)
            functionalize(nodes, network)
            return nodes, network, untraced
        except Untraceable as failure:
            name = failure.name or "root"
            if name in untraced:
                raise UnsupportedModel(f"cannot trace {name!r}: {failure.reason}") from failure
            if not failure.name:
                network, untraced = _Whole(network).eval(), {}
            untraced = {inner: why for inner, why in untraced.items() if not inner.startswith(f"{name}.")}
            untraced[name] = failure.reason


def _verify(graph: fx.GraphModule, model: nn.Module, batch: Tensor) -> None:
    largest, difference = _difference(graph, model, batch)
    if _TOLERANCE * largest < difference < _ROUNDING * largest:
        # A deep network can blow up the rounding of sums in another order, as of attention that was fused.
        largest, difference = _difference(copy.deepcopy(graph).double(), copy.deepcopy(model).double(), batch.double())
    if not difference <= _TOLERANCE * largest:  # also where either is not a number
        raise UnsupportedModel(
            f"the graph of {type(model).__name__} at batch size {len(batch)} is off by {difference:.3g} of "
            f"{largest:.3g}: its forward may depend on random numbers, on earlier calls or on the batch size"
        )


def _difference(graph: fx.GraphModule, model: nn.Module, batch: Tensor) -> tuple[float, float]:
    """The largest output of ``model`` and the largest difference from it."""
    with torch.no_grad():
        expected, found = model(batch.clone()), graph(batch)  # the model may write into its input
    if not isinstance(expected, Tensor):
        raise UnsupportedModel(
            f"{type(model).__name__} returns a {type(expected).__name__}: wrap it to return its logits"
        )
    if expected.shape != found.shape:
        return 0.0, math.inf
    return expected.abs().max().item(), (found - expected).abs().max().item()
