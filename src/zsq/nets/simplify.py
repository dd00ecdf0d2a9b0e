"""What a traced graph is rid of: checks, in-place writing, sizes that are always the same, and what nobody reads."""

import contextlib
import inspect
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from zsq.core.teacher import Landmarks, only_tokens
from zsq.nets.landmarks import landmarks
from zsq.nets.tracing import Untraceable

__all__ = ["Sizes", "functionalize", "mark_shapes", "simplify", "some_tokens"]


def simplify(
    nodes: fx.Graph, network: nn.Module, batches: tuple[Tensor, Tensor], untraced: dict[str, str]
) -> fx.GraphModule:
    """The module that runs ``nodes``, traced from ``network``; ``batches`` are images, of two different numbers.

    ``untraced`` becomes its meta of that name.
    """
    for node in list(nodes.nodes):
        node.meta.pop(
            "is_wrapped", None
        )  # or the generated code would make this function opaque for all tracing to come
        if node.op == "call_function" and node.target is torch._assert:
            nodes.erase_node(node)  # a check on sizes, which are those of the example from here on
    graph = fx.GraphModule(network, nodes, class_name=type(network).__name__)
    graph.meta["untraced"] = untraced
    runs = [Sizes(graph), Sizes(graph)]
    for run, batch in zip(runs, batches, strict=True):
        run.run(batch)
    mark_shapes(runs[1])
    marks = landmarks(graph)
    if marks.tokens:
        fewer = Sizes(graph)
        with contextlib.suppress(Exception), only_tokens(graph, marks.tokens, some_tokens(marks, batches[1], 2)):
            fewer.run(batches[1])  # where this fails, as windows do, tokens cannot be left out
            runs.append(fewer)
    _write_sizes(graph, runs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    graph.delete_all_unused_submodules()
    return graph


def some_tokens(marks: Landmarks, batch: Tensor, step: int) -> Tensor:
    """The prefix and each ``step``-th patch from the last one backwards, of each image in ``batch``: (N, k)."""
    count = marks.prefix + marks.grid[0] * marks.grid[1]
    kept = [*range(marks.prefix), *range(count - 1, marks.prefix - 1, -step)]
    return torch.tensor(kept, device=batch.device).expand(len(batch), -1)


def mark_shapes(run: "Sizes") -> None:
    """Writes into the nodes of a graph the shapes that their tensors had in ``run``."""
    for node, shape in run.shapes.items():
        node.meta["shape"] = shape


class Sizes(fx.Interpreter):
    """Runs a graph, and keeps the shapes of the tensors and the values that are plain numbers."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.numbers: dict[fx.Node, int | float] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the graph."""
        with torch.no_grad():
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """The value of one node, noted."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        elif type(value) in (int, float, bool):
            self.numbers[n] = value
        return value


def _write_sizes(graph: fx.GraphModule, runs: list[Sizes]) -> None:
    """Writes a number into the nodes that read it, or takes it from their first input if the runs differ in it.

    It differs where it depends on the number of images, or of tokens. A size that is read once and used in module
    after module would tie all of them into one block.
    """
    for node in list(graph.graph.nodes):
        source = node.all_input_nodes[0] if node.all_input_nodes else node
        dims = list(zip(*(run.shapes.get(source, ()) for run in runs), strict=True))
        known: dict[fx.Node, Any] = {}
        for number in node.all_input_nodes:
            values = tuple(run.numbers.get(number) for run in runs)
            if None in values:
                continue
            if len(set(values)) == 1:
                known[number] = values[0]
            elif values in dims:
                with graph.graph.inserting_before(node):
                    known[number] = graph.graph.call_method("size", (source, dims.index(values)))
                known[number].meta["module_path"] = node.meta["module_path"]
        if known:
            node.args = fx.node.map_arg(node.args, partial(_replaced, known))
            node.kwargs = fx.node.map_arg(node.kwargs, partial(_replaced, known))


def _replaced(known: dict[fx.Node, Any], node: fx.Node) -> Any:
    return known.get(node, node)


def functionalize(nodes: fx.Graph, network: nn.Module) -> None:
    """Makes in-place operations return new tensors, so that the value at a block's border stays what was recorded.

    Later readers of an overwritten tensor read the result instead.

    Raises:
        Untraceable: for the module that writes into a tensor through a view of it.
    """
    position = {node: index for index, node in enumerate(nodes.nodes)}
    for node in [node for node in nodes.nodes if _writes(node, network)]:
        here = position[node]
        node.all_input_nodes[0].replace_all_uses_with(node, lambda user, here=here: position[user] > here)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op == "call_module":
            network.get_submodule(str(node.target)).inplace = False  # type: ignore[assignment]  # no Tensor
        elif (call := _inplace_call(node)) is not None:
            call.arguments["inplace"] = False
            node.args, node.kwargs = call.args, call.kwargs
        else:
            places = [Tensor] if node.op == "call_method" else [torch, F]
            twins = [twin for place in places if (twin := getattr(place, name[:-1], None)) is not None]
            if not twins or not node.users:
                raise Untraceable(node.meta["module_path"], f"{name} writes into a tensor through a view of it")
            node.target = name[:-1] if node.op == "call_method" else twins[0]


def _writes(node: fx.Node, network: nn.Module) -> bool:
    if node.op == "call_module":
        return getattr(network.get_submodule(str(node.target)), "inplace", False) is True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    named = node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")
    return named or _inplace_call(node) is not None


def _inplace_call(node: fx.Node) -> inspect.BoundArguments | None:
    """The arguments of a function that has an ``inplace`` switch, if it is on."""
    if node.op != "call_function" or not isinstance(node.target, FunctionType):
        return None
    signature = inspect.signature(node.target)
    if "inplace" not in signature.parameters:
        return None
    call = signature.bind(*node.args, **node.kwargs)
    return call if call.arguments.get("inplace") is True else None
