"""Blocks: the units that reconstruction fits one after the other, found from the modules a network is written in."""

import itertools
from collections.abc import Container, Iterator
from dataclasses import dataclass

from torch import fx, nn

from zsq.core.errors import UnsupportedModel
from zsq.nets.tracing import LAYER_FUNCTIONS, LAYERS

__all__ = ["Block", "blocks", "extract", "mark_blocks"]

_LARGEST = 8
"""Layers in a block. The units that papers reconstruct (a residual block, a transformer block, an inception branch set)
have fewer; above it, a module is a stage, and is split where that is possible."""


@dataclass(frozen=True)
class Block:
    """A part of a graph that one value enters and one value leaves."""

    name: str
    """The dotted name of the module it is, or of its first layer."""
    nodes: tuple[fx.Node, ...]
    """In topological order, without the input and the output of the graph."""
    entry: fx.Node
    """The node before it, whose value enters."""
    exit: fx.Node
    """The node in it whose value leaves."""


@dataclass(frozen=True)
class _Span:
    """The nodes ``first`` to ``last``, counted in the body of the graph, that module ``name`` ran in one go."""

    name: str
    first: int
    last: int

    def holds(self, other: "_Span") -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


def blocks(graph: fx.GraphModule) -> list[Block]:
    """The blocks of a captured graph in the order in which they run; together they hold all its nodes.

    Right also after nodes were removed or inserted: a new node belongs to the first block that reads its value, so a
    quantizer on the value between two blocks is the second one's.
    """
    nodes = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    names = list(dict.fromkeys(node.meta["block"] for node in nodes if "block" in node.meta))
    if not names:
        raise UnsupportedModel("this graph has no blocks: make it with zsq.nets.graph.capture")
    index = {name: position for position, name in enumerate(names)}
    home: dict[fx.Node, int] = {}
    for node in reversed(graph.graph.nodes):
        readers = [home[user] for user in node.users]
        home[node] = index.get(node.meta.get("block", ""), min(readers, default=len(names) - 1))
    found, entry = [], next(node for node in graph.graph.nodes if node.op == "placeholder")
    constant = constants(graph.graph)
    for position, name in enumerate(names):
        inside = tuple(node for node in nodes if home[node] == position)
        leaving = [
            node
            for node in inside
            if node not in constant and any(home[user] > position or user.op == "output" for user in node.users)
        ]
        if len(leaving) != 1:
            raise UnsupportedModel(
                f"block {name!r} must have one value that is read later, found {[node.name for node in leaving]}"
            )
        found.append(Block(name, inside, entry, leaving[0]))
        entry = leaving[0]
    return found


def extract(graph: fx.GraphModule, block: Block | str) -> fx.GraphModule:
    """``block`` alone, as a module from the value that enters to the value that leaves.

    Shares the modules, parameters and buffers of ``graph``. A block of another copy of the network is found by name.
    """
    name = block if isinstance(block, str) else block.name
    here = next((each for each in blocks(graph) if each.name == name), None)
    if here is None:
        raise UnsupportedModel(f"no block {name!r}: the graph has {', '.join(each.name for each in blocks(graph))}")
    wanted, todo = {here.entry}, [here.exit]
    while todo:
        if (node := todo.pop()) not in wanted:
            wanted.add(node)
            todo.extend(node.all_input_nodes)
    part = fx.Graph()
    copies = {here.entry: part.placeholder(here.entry.name)}
    copies[here.entry].meta = dict(here.entry.meta)
    for node in graph.graph.nodes:
        if node in wanted and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(copies[here.exit])
    module = fx.GraphModule(graph, part, class_name="Block")
    called = {node.target for node in part.nodes}
    module.meta["untraced"] = {name: why for name, why in graph.meta["untraced"].items() if name in called}
    return module


def constants(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose value does not depend on the images: parameters, buffers, and what is made of them alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and all(each in found for each in node.all_input_nodes):
            found.add(node)
    return found


def mark_blocks(graph: fx.GraphModule, network: nn.Module) -> None:
    """Writes ``meta["block"]`` into the nodes of ``graph``, captured from ``network``; constants go with their readers.

    A *cut* lies after a node where exactly one value, tensor or not, is still to be read. A module of ``network`` that
    is no plain container, lies between two cuts and has two layers or more is a candidate. A candidate gives way to
    those inside it if they are several (a stage of blocks), or if it has over eight layers and can be cut; a lone one
    inside it (the squeeze-excitation in an inverted residual) does not count. Layers outside start blocks of their own,
    at the cut before them; what has no layer goes with the layer before it, and after a module with the next one.
    """
    constant = constants(graph.graph)
    body = [node for node in graph.graph.nodes if node not in constant and node.op not in ("placeholder", "output")]
    cut, weights = _cuts(body), [layers_in(graph, node) for node in body]
    spans = {
        (span.first, span.last): span  # of modules that hold exactly the same nodes, the innermost
        for span in sorted(_module_spans(body, graph.meta["untraced"]), key=lambda span: len(span.name))
        if type(network.get_submodule(span.name)) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        and (span.first == 0 or cut[span.first - 1])
        and cut[span.last]
        and sum(weights[span.first : span.last + 1]) > 1
    }
    seen: dict[str, int] = {}
    for segment in _segments(body, _choose(list(spans.values()), cut, weights), cut, weights):
        seen[segment.name] = seen.get(segment.name, 0) + 1
        number = seen[segment.name]  # a module that runs twice is two blocks
        for node in body[segment.first : segment.last + 1]:
            node.meta["block"] = segment.name if number == 1 else f"{segment.name}@{number}"


def layers_in(graph: fx.GraphModule, node: fx.Node) -> int:
    """How many layers with weights ``node`` runs: one, or more where a module could not be traced."""
    if node.op != "call_module":
        return int(node.target in LAYER_FUNCTIONS)
    module = graph.get_submodule(str(node.target))
    inside = module.modules() if node.target in graph.meta["untraced"] else [module]
    return sum(isinstance(each, LAYERS) for each in inside)


def _cuts(body: list[fx.Node]) -> list[bool]:
    """For each node whether a cut lies after it."""
    position = {node: index for index, node in enumerate(body)}
    images = {each for node in body for each in node.all_input_nodes if each.op == "placeholder"}
    changes = [0] * (len(body) + 1)  # of the number of values that are live after a node
    for node in (*images, *body):
        if node.users:
            changes[position.get(node, 0)] += 1
            changes[max(position.get(user, len(body)) for user in node.users)] -= 1
    return [live == 1 for live in itertools.accumulate(changes)][: len(body)]


def _module_spans(body: list[fx.Node], untraced: Container[str]) -> Iterator[_Span]:
    paths = [str(node.target if node.target in untraced else node.meta["module_path"]) for node in body]
    running: dict[str, int] = {}
    for index, path in enumerate([*paths, ""]):
        inside = set(itertools.accumulate(path.split("."), "{}.{}".format)) - {""}
        for name in [name for name in running if name not in inside]:
            yield _Span(name, running.pop(name), index - 1)
        for name in inside:
            running.setdefault(name, index)


def _choose(spans: list[_Span], cut: list[bool], weights: list[int]) -> list[_Span]:
    """The candidates that become blocks; any two of ``spans`` are nested or disjoint."""
    chosen = []
    for span in [span for span in spans if not any(other.holds(span) for other in spans)]:
        inner = _choose([other for other in spans if span.holds(other)], cut, weights)
        own = weights[span.first : span.last + 1]
        divisible = any(
            cut[span.first + size - 1] and any(own[:size]) and any(own[size:]) for size in range(1, len(own))
        )
        chosen += inner if len(inner) > 1 or (sum(own) > _LARGEST and divisible) else [span]
    return chosen


def _segments(body: list[fx.Node], chosen: list[_Span], cut: list[bool], weights: list[int]) -> Iterator[_Span]:
    """All of ``body`` in order: the ``chosen`` modules, the layers between them, and to each its share of the rest."""
    modules = {span.first: span for span in chosen}
    starts: list[tuple[int, str]] = []
    first, free = 0, True  # free: the nodes since the last module have no layer, and wait in `begin` for the next one
    begin = 0
    while first < len(body):
        last = modules[first].last if first in modules else cut.index(True, first)
        layer = next((body[index] for index in range(first, last + 1) if weights[index]), None)
        if first in modules:
            starts.append((first, modules[first].name))
            begin, free = last + 1, True
        elif layer is not None:
            name = str(layer.target) if layer.op == "call_module" else layer.name
            starts.append((begin if free else first, name))
            free = False
        first = last + 1
    starts = [(0, starts[0][1]), *starts[1:]] if starts else [(0, "network")]
    ends = [start - 1 for start, _ in starts[1:]] + [len(body) - 1]
    for (start, name), end in zip(starts, ends, strict=True):
        yield _Span(name, start, end)
