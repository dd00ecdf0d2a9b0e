"""The passes that put quantizers into a student, and that find the ranges of its activations."""

import contextlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from zsq.core import FLOAT, Job, Recipe, Source, check_counts, look
from zsq.nets.folding import fold_batchnorms
from zsq.nets.graph import hidden_layers, is_matmul, layers
from zsq.nets.tracing import LAYERS
from zsq.quant.grid import MinMax, Range
from zsq.quant.placement import MINMAX_PTQ, Edge, QuantizationProtocol, moved_to
from zsq.quant.quantizers import ActivationQuantizer, activation_quantizers, float_mode, quantize_weight
from zsq.quant.rounding import Nearest, Rounding

__all__ = [
    "Calibrate",
    "FoldBatchNorm",
    "InsertFakeQuant",
    "complete",
    "edge_of",
    "fold",
    "insert_activation_quantizer",
    "layers_in_order",
    "quantize_input",
]

_HOME = "activation_quantizers"
"""The submodule of the student that holds the quantizers of its edges."""


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm(Recipe):
    """Fold every BatchNorm into the layer before it, exactly, and keep what it said about that layer's output."""

    def apply(self, job: Job, source: Source) -> None:
        """Change ``job.student`` in place."""
        fold(job.student)


@dataclass(frozen=True, kw_only=True)
class InsertFakeQuant(Recipe):
    """Quantize the weights of all layers, and insert quantizers on the edges that the protocol names."""

    protocol: QuantizationProtocol = MINMAX_PTQ
    range: Range = MinMax()
    """How the range of a weight row is found."""
    rounding: Rounding = Nearest()
    """How a weight picks its grid point."""
    follow: bool = False
    """Find the range anew from the weight at every step in which it learns."""

    def apply(self, job: Job, source: Source) -> None:
        """Change ``job.student`` in place; activations pass unchanged until their ranges are set."""
        graph, protocol = job.student, self.protocol
        if protocol.fold:
            fold(graph)
        edges = protocol.placement.edges(graph)
        grids = {edge.source: protocol.grid(edge.source) for edge in edges}
        every, hidden = layers_in_order(graph), hidden_layers(graph)
        for position, layer in enumerate(every.values()):
            bits = protocol.ends.weights(position, len(every), job.bits.weights)
            if bits != FLOAT:
                quantize_weight(layer, bits, protocol.weights, self.range, self.rounding, self.follow)
        for edge in edges:
            bits = self._edge_bits(edge, list(every), job.bits.activations)
            grid = grids[edge.source]
            if bits != FLOAT and grid is not None:
                quantizer = ActivationQuantizer(bits, grid)
                if protocol.pixels == "possible" and edge.source.op == "placeholder":
                    quantizer.holds = job.pixel_range
                insert_activation_quantizer(graph, edge, quantizer)
        for name, layer in hidden.items():
            bits = self._input_bits([name], list(every), job.bits.activations)
            if bits != FLOAT:
                quantize_input(layer, ActivationQuantizer(bits, protocol.activations))
        graph.recompile()

    def _edge_bits(self, edge: Edge, every: list[str], bits: int) -> int:
        reading = [end for reader in edge.readers for end in moved_to(reader)]
        named = [str(end.target) for end in reading if str(end.target) in every]
        unread = self.protocol.ends.unread
        if unread is not None and bits != FLOAT and not named and not any(is_matmul(end) for end in reading):
            return unread
        return self._input_bits(named, every, bits)

    def _input_bits(self, reading: list[str], every: list[str], bits: int) -> int:
        """The widest that a layer among those ``reading`` asks for: a shared tensor is stored once."""
        if bits == FLOAT:
            return FLOAT
        asked = [self.protocol.ends.inputs(every.index(name), len(every), bits) for name in reading]
        return max(asked, default=bits)


@dataclass(frozen=True, kw_only=True)
class Calibrate(Recipe):
    """Set activation ranges from images.

    Of an image that is to be seen by some of its tokens, a transformer sees those alone.
    """

    range: Range = MinMax()
    """How the range of a batch is found; later batches widen it."""
    inputs: Literal["quantized", "float"] = "quantized"
    """Whether an edge is seen behind layers that are quantized already, or as the teacher computes it."""
    samples: int = 256
    """Images to look at, at most."""
    batch_size: int = 256

    reads_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self, "samples", "batch_size")

    def apply(self, job: Job, source: Source) -> None:
        """Change ``job.student`` in place."""
        quantizers = activation_quantizers(job.student)
        if not quantizers:
            return
        for quantizer in quantizers.values():
            quantizer.observe(self.range)
        seeing = float_mode(job.student) if self.inputs == "float" else contextlib.nullcontext()
        with torch.no_grad(), seeing:
            for batch in source.batches(self.batch_size, self.samples):
                look(job.student, batch.images, frozenset(), job.teacher.landmarks, batch.tokens)
        for quantizer in quantizers.values():
            quantizer.observe(None)  # one on a branch that no image took stays float, and is reported


def fold(graph: fx.GraphModule) -> None:
    """Fold every BatchNorm that can be, in place, and keep the moments of the layers in ``graph.meta["moments"]``."""
    if "moments" not in graph.meta:
        graph.meta["moments"] = fold_batchnorms(graph)
        graph.meta.setdefault("edits", []).append(["fold"])


def complete(graph: fx.GraphModule, name: str) -> None:
    """Give the layer ``name``, in place, a bias of 0 (and a LayerNorm a weight of 1) if it has none.

    Noted, so that a student from a file has them too.
    """
    layer = graph.get_submodule(name)
    device = next((parameter.device for parameter in graph.parameters()), None)
    missing: dict[str, Tensor] = {}
    if isinstance(layer, nn.LayerNorm) and layer.weight is None:
        missing["weight"] = torch.ones(layer.normalized_shape, device=device)
    if layer.bias is None:
        size = layer.normalized_shape if isinstance(layer, nn.LayerNorm) else (_outputs(layer),)
        missing["bias"] = torch.zeros(size, device=device)
    for kind, value in missing.items():
        setattr(layer, kind, nn.Parameter(value, requires_grad=False))
    if missing:
        graph.meta.setdefault("edits", []).append(["complete", name])


def _outputs(layer: nn.Module) -> int:
    assert isinstance(layer, LAYERS)
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def layers_in_order(graph: fx.GraphModule) -> dict[str, nn.Module]:
    """Every layer by dotted name in the order in which they run, those of an untraced module as it registers them."""
    found: dict[str, nn.Module] = {}
    hidden, visible = hidden_layers(graph), layers(graph)
    for node in graph.graph.nodes:
        if node in visible:
            found[str(node.target)] = graph.get_submodule(str(node.target))
        elif node.op == "call_module":
            found.update({name: layer for name, layer in hidden.items() if name.startswith(f"{node.target}.")})
    return found


def insert_activation_quantizer(graph: fx.GraphModule, edge: Edge, quantizer: ActivationQuantizer) -> None:
    """Let the readers of ``edge`` read its source through ``quantizer``, in place; the graph must be recompiled."""
    if not hasattr(graph, _HOME):
        graph.add_module(_HOME, nn.ModuleDict())
    home = graph.get_submodule(_HOME)
    assert isinstance(home, nn.ModuleDict)
    home[edge.source.name] = quantizer.to(next((p.device for p in graph.parameters()), None))
    with graph.graph.inserting_after(edge.source):
        node = graph.graph.call_module(f"{_HOME}.{edge.source.name}", (edge.source,))
    node.meta["shape"] = edge.source.meta["shape"]
    for reader in edge.readers:
        reader.replace_input_with(edge.source, node)


def edge_of(graph: fx.GraphModule, name: str) -> Edge | None:
    """The edge on which the activation quantizer ``name`` sits; None for one inside a module that was not traced."""
    node = next((node for node in graph.graph.nodes if node.op == "call_module" and node.target == name), None)
    return Edge(node.all_input_nodes[0], tuple(node.users)) if node else None


def quantize_input(layer: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Quantize what enters ``layer`` where no edge of a graph is visible, in place."""
    layer.add_module("input_quantizer", quantizer)
    layer.register_forward_pre_hook(_through_quantizer)


def _through_quantizer(layer: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return (layer.get_submodule("input_quantizer")(inputs[0]), *inputs[1:])
