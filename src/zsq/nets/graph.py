"""Networks as graphs: capture, who makes and who reads a value, layers, products, and the blocks of reconstruction."""

import copy
import inspect
import operator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from zsq.core.errors import UnsupportedModel
from zsq.nets.blocks import Block, blocks, extract, mark_blocks
from zsq.nets.tracing import LAYER_FUNCTIONS, LAYERS, LayerTracer, Untraceable, functionalize, is_layer, prepare

__all__ = [
    "Block",
    "Matmul",
    "blocks",
    "capture",
    "consumers",
    "extract",
    "hidden_layers",
    "layers",
    "matmuls",
    "module_of",
    "preserves_value",
    "producer",
]

_TOLERANCE = 1e-5
"""Largest difference of a capture from its network, relative to the largest output: float32 sums in another order."""


class Matmul(NamedTuple):
    """A product of two computed values: the node, and its two operands."""

    node: fx.Node
    left: fx.Node
    right: fx.Node


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
    - ``"block"``: what ``blocks`` reads.

    Raises:
        UnsupportedModel: if ``model`` does not return one tensor, or the graph does not compute what ``model`` does.
    """
    network = copy.deepcopy(model).eval()
    one = example[:1].detach()
    batches = one, torch.cat([one, one.flip(-1)])
    with torch.no_grad():
        expected = [network(batch) for batch in batches]
    if not all(isinstance(out, Tensor) for out in expected):
        raise UnsupportedModel(
            f"{type(model).__name__} returns a {type(expected[0]).__name__}, not one tensor: wrap it to return logits"
        )
    network = prepare(_Whole(network).eval() if is_layer(network) else network)
    untraced: dict[str, str] = {}
    while True:
        try:
            nodes = LayerTracer(batches, untraced).trace(network)
            break
        except Untraceable as failure:
            if failure.name == "":
                network, failure.name, untraced = _Whole(network).eval(), "root", {}
            if failure.name in untraced:
                raise UnsupportedModel(f"cannot trace {failure.name!r}: {failure.reason}") from failure
            untraced = {name: why for name, why in untraced.items() if not name.startswith(f"{failure.name}.")}
            untraced[failure.name] = failure.reason
    functionalize(nodes, network)
    for node in list(nodes.nodes):
        if node.op == "call_function" and node.target is torch._assert:
            nodes.erase_node(node)  # a check on sizes, which are those of the example from here on
    graph = fx.GraphModule(network, nodes, class_name=type(model).__name__)
    nodes.eliminate_dead_code()
    graph.recompile()
    graph.delete_all_unused_submodules()
    graph.meta["untraced"] = untraced
    for batch, out in zip(batches, expected, strict=True):
        _compare(graph, batch, out, type(model).__name__)
    _Shapes(graph).run(example)
    mark_blocks(graph, network)
    return graph.eval()


def _compare(graph: fx.GraphModule, batch: Tensor, expected: Tensor, name: str) -> None:
    with torch.no_grad():
        found = graph(batch)
    difference = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
    largest = expected.abs().max().item()
    if not difference <= _TOLERANCE * largest:  # also where either is not a number
        raise UnsupportedModel(
            f"the graph of {name} differs from it by {difference:.3g} (its largest output is {largest:.3g}) at batch "
            f"size {len(batch)}: its forward may depend on random numbers, on earlier calls or on the batch size"
        )


class _Shapes(fx.Interpreter):
    """Runs a graph once and writes the shape of every tensor into ``meta["shape"]`` of its node."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["shape"] = tuple(value.shape)
        return value


def layers(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes that are convolutions, transposed convolutions or linears, in the order in which they run."""
    return [node for node in graph.graph.nodes if isinstance(module_of(node), LAYERS)]


def hidden_layers(graph: fx.GraphModule) -> dict[str, nn.Module]:
    """The convolutions and linears inside modules that could not be traced, by dotted name."""
    return {
        f"{outer}.{name}": layer
        for outer in graph.meta["untraced"]
        for name, layer in graph.get_submodule(outer).named_modules()
        if isinstance(layer, LAYERS)
    }


_MATMULS = {torch.matmul, torch.bmm, torch.mm, operator.matmul, "matmul", "bmm", "mm", *LAYER_FUNCTIONS}
_ADDING_MATMULS = {torch.baddbmm, torch.addmm, "baddbmm", "addmm"}


def matmuls(graph: fx.GraphModule) -> list[Matmul]:
    """The products of two values that are not layers: in attention, or ``F.linear`` and ``F.conv2d`` on a value."""
    found = []
    for node in graph.graph.nodes:
        if node.target is torch.einsum or node.target in _MATMULS or node.target in _ADDING_MATMULS:
            operands: list[fx.Node] = []
            fx.node.map_arg((node.args, node.kwargs), operands.append)
            operands = operands[1:] if node.target in _ADDING_MATMULS else operands
            if node.target is not torch.einsum or len(operands) == 2:
                found.append(Matmul(node, *operands[:2]))  # a third one is a bias
    return found


def module_of(node: fx.Node) -> nn.Module | None:
    """The module that ``node`` calls, if it does."""
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if node.op == "call_module" and owner is not None else None


def preserves_value(node: fx.Node) -> bool:
    """Whether ``node`` passes on, in eval mode, the very values that it reads: identity, dropout, stochastic depth."""
    if node.op == "call_function" and isinstance(node.target, FunctionType):
        signature = inspect.signature(node.target)
        drops = "drop" in node.target.__name__ or node.target.__name__ == "stochastic_depth"
        return drops and signature.bind(*node.args, **node.kwargs).arguments.get("training", True) is False
    if node.op == "call_method":
        return node.target in ("contiguous", "clone", "detach")
    return isinstance(module_of(node), (nn.Identity, nn.modules.dropout._DropoutNd))


def producer(node: fx.Node) -> fx.Node:
    """The node that computes what ``node`` reads first, seen through nodes that preserve it."""
    source = node.all_input_nodes[0]
    return producer(source) if preserves_value(source) else source


def consumers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read the value of ``node``, the output too, seen through nodes that preserve it."""
    return [each for user in node.users for each in (consumers(user) if preserves_value(user) else [user])]
