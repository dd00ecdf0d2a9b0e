"""Where in a network a method may look: the classifier, the last map, the ends of the residual branches."""

import operator

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from zsq.core.teacher import Landmarks
from zsq.nets.nodes import hidden_layers, layers, module_of, preserves_value

__all__ = ["landmarks"]

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
    return Landmarks(
        classifier=names[-1] if names else "",
        convolution=str(maps[-1].target) if maps else "",
        branches=tuple(dict.fromkeys(branches)),
    )


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
