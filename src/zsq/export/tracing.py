"""A lowered graph as ``torch.export`` sees it, for any batch size."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from zsq.core import UnsupportedModel

__all__ = ["exported", "place_of", "place_of_operator", "quiet"]


def exported(graph: fx.GraphModule, input_shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """The program of a lowered ``graph``, from ``images`` (N, C, H, W) with N free.

    Raises:
        UnsupportedModel: if torch cannot export it; names the part of the network where it stopped.
    """
    size = torch.export.Dim("N", min=1)
    try:
        with quiet():
            return torch.export.export(graph, (torch.zeros(2, *input_shape),), dynamic_shapes=({0: size},))
    except Exception as error:  # anything that a network does can fail in its own way
        said = str(error)
        stopped = re.search(r"While executing %(\w+)", said)
        node = next((node for node in graph.graph.nodes if stopped and node.name == stopped[1]), None)
        place = f"torch.export stops at {place_of(node)}" if node else "torch.export cannot follow this network"
        reason = next((line for line in said.splitlines() if line.strip()), type(error).__name__)
        raise UnsupportedModel(
            f"{place} ({reason}): rewrite that part so that it depends on neither values nor the batch size"
        ) from error


def place_of(node: fx.Node) -> str:
    """The dotted name of the layer that ``node`` calls, or what it does inside which module."""
    if node.op == "call_module":
        return str(node.target)
    inside = node.meta.get("module_path")
    return f"{node.name} in {inside}" if inside else node.name


def place_of_operator(graph: fx.GraphModule, operator: str, input_shape: tuple[int, int, int]) -> str:
    """Where ``graph`` first runs an ATen ``operator`` whose name holds this one; the operator, if nowhere."""
    walk = _Walk(graph, operator)
    with torch.no_grad():
        walk.run(torch.zeros(2, *input_shape))
    return next((place_of(node) for node in walk.found), f"the operator {operator}")


class _Walk(fx.Interpreter):
    """Runs a graph, and notes the nodes that run an operator."""

    def __init__(self, graph: fx.GraphModule, operator: str) -> None:
        super().__init__(graph)
        self.operator = operator
        self.found: list[fx.Node] = []

    def run_node(self, n: fx.Node) -> Any:
        """The value of one node."""
        with _Watch() as watch:
            value = super().run_node(n)
        if any(self.operator in name for name in watch.names):
            self.found.append(n)
        return value


class _Watch(TorchDispatchMode):
    """Notes the names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's is
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch says of itself while it exports: none of it concerns the network."""
    with warnings.catch_warnings():
        # torch copies a deprecated class of its own.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        yield
