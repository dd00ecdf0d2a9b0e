"""What can be asked of the nodes of a graph: who makes and who reads a value, which are layers, which are products."""

import inspect
import operator
from types import FunctionType
from typing import NamedTuple

import torch
from torch import fx, nn

from zsq.nets.tracing import LAYER_FUNCTIONS, LAYERS, asks_size

__all__ = [
    "Matmul",
    "consumers",
    "hidden_layers",
    "is_matmul",
    "layers",
    "matmuls",
    "module_of",
    "preserves_value",
    "producer",
]


class Matmul(NamedTuple):
    """A product of two computed values: the node, and its two operands."""

    node: fx.Node
    left: fx.Node
    right: fx.Node


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


def is_matmul(node: fx.Node) -> bool:
    """Whether ``node`` multiplies matrices as a function or a method."""
    return node.target is torch.einsum or node.target in _MATMULS or node.target in _ADDING_MATMULS


def matmuls(graph: fx.GraphModule) -> list[Matmul]:
    """The products of two values that are not layers: in attention, or ``F.linear`` and ``F.conv2d`` on a value."""
    found = []
    for node in graph.graph.nodes:
        if is_matmul(node):
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
    """The nodes that read the values of ``node``, the output too, seen through nodes that preserve them.

    A node that asks for the size only is none of them.
    """
    readers = [user for user in node.users if not asks_size(user)]
    return [each for user in readers for each in (consumers(user) if preserves_value(user) else [user])]
