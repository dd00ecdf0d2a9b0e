"""Where in a network a method may look: classifier, last map, ends of residual branches, attention and its tokens."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from zsq.core.teacher import Landmarks
from zsq.nets.nodes import Matmul, hidden_layers, layers, matmuls, module_of, preserves_value

__all__ = ["landmarks"]

_SOFTMAXES = {torch.softmax, F.softmax, "softmax"}
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}


def landmarks(graph: fx.GraphModule) -> Landmarks:
    """The landmarks of a captured network, by execution order and not by the names or the order of its modules.

    The residual branch of an addition is the operand that more layers computed which the other does not share.
    """
    visible = layers(graph)
    names = [str(node.target) for node in visible] or list(hidden_layers(graph))
    maps = [node for node in visible if isinstance(module_of(node), _ConvNd) and _pixels(node) > 1]
    ends = [_branch(node) for node in graph.graph.nodes if node.target in _ADDS and _pixels(node) > 1]
    branches = [str(end.target) for end in ends if end is not None] or [str(_normalized(node).target) for node in maps]
    products = [product.node for product in matmuls(graph) if _attends(product)]
    tokens, prefix, grid = _tokens(graph, products)
    return Landmarks(
        classifier=names[-1] if names else "",
        convolution=str(maps[-1].target) if maps else "",
        branches=tuple(dict.fromkeys(branches)),
        attention=len(products),
        tokens=tokens,
        prefix=prefix,
        grid=grid,
    )


def _attends(product: Matmul) -> bool:
    """Whether the left operand is a softmax over the last dimension."""
    left = product.left
    while preserves_value(left):
        left = left.all_input_nodes[0]
    dim: Any
    if isinstance(module := module_of(left), nn.Softmax):
        dim = module.dim
    elif left.target in _SOFTMAXES:
        dim = left.kwargs.get("dim", left.args[1] if len(left.args) > 1 else None)
    else:
        return False
    shapes = [node.meta.get("shape", ()) for node in (left, product.node)]
    return dim in (-1, len(shapes[0]) - 1) and shapes[0][:-1] == shapes[1][:-1]


def _tokens(graph: fx.GraphModule, products: list[fx.Node]) -> tuple[str, int, tuple[int, int]]:
    """The module that makes the tokens which enter the first transformer block, and what it makes: prefix and grid.

    They are what the first addition of attention adds to, as long as it is (N, T, D) and its patches come from a
    convolution; else there are none.
    """
    for addition in (node for node in graph.graph.nodes if node.target in _ADDS and len(node.all_input_nodes) == 2):
        made = [_ancestors(operand) for operand in addition.all_input_nodes]
        for stream, before, branch in zip(addition.all_input_nodes, made, reversed(made), strict=True):
            if stream in branch and not (branch - before).isdisjoint(products):
                shape = stream.meta.get("shape", ())
                while preserves_value(stream) and stream.op != "call_module":
                    stream = stream.all_input_nodes[0]
                patches = [node for node in layers(graph) if node in before and isinstance(module_of(node), _ConvNd)]
                if len(shape) != 3 or stream.op != "call_module" or not patches or not _pixels(patches[-1]):
                    return "", 0, (0, 0)
                _, _, rows, columns = patches[-1].meta["shape"]
                prefix = shape[1] - rows * columns
                return (str(stream.target), prefix, (rows, columns)) if prefix >= 0 else ("", 0, (0, 0))
    return "", 0, (0, 0)


def _branch(addition: fx.Node) -> fx.Node | None:
    """What ends the residual branch of ``addition``: its last module that changes values; None if there is none."""
    if len(addition.all_input_nodes) != 2:
        return None
    made = {operand: _ancestors(operand) for operand in addition.all_input_nodes}
    one, other = made
    node = max(one, other, key=lambda operand: _layers(made[operand] - made[other if operand is one else one]))
    while node.op != "call_module" or preserves_value(node):
        computed = [each for each in node.all_input_nodes if each.op != "get_attr"]  # a layer scale is none
        if not computed:
            return None
        node = computed[0]
    return node


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, todo = {node}, [node]
    while todo:
        for each in todo.pop().all_input_nodes:
            if each not in found:
                found.add(each)
                todo.append(each)
    return found


def _layers(nodes: set[fx.Node]) -> int:
    return sum(isinstance(module_of(node), _ConvNd | nn.Linear) for node in nodes)


def _normalized(layer: fx.Node) -> fx.Node:
    """The BatchNorm behind ``layer``, or ``layer`` itself."""
    return next((user for user in layer.users if isinstance(module_of(user), _BatchNorm)), layer)


def _pixels(node: fx.Node) -> int:
    """The size of the map (N, C, H, W) that ``node`` makes; 0 where it makes none."""
    shape = node.meta.get("shape", ())
    return int(shape[2] * shape[3]) if len(shape) == 4 else 0
