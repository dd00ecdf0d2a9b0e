"""What the graph of an exported file says: which layers run in integers, on which grids, with which biases."""

import ast
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    Array = np.ndarray[Any, Any]

__all__ = [
    "FloatLayer",
    "Graph",
    "bias_faults",
    "clipped_in_float",
    "grid_faults",
    "left_by_onnxruntime",
    "left_by_openvino",
]

_COMPUTING = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FLOAT_KERNELS = {*_COMPUTING, "FusedConv", "FusedGemm", "FusedMatMul"}
"""What ONNX Runtime calls the kernels that multiply and add floats, in any of its domains."""
_MOVING = {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Identity", "Slice", "Gather", "Split"}
"""Operators that only pick or move values: what they make lies on the grid of what they read."""
_ACTIVATIONS = {"Relu", "Clip"}
"""Operators that ONNX Runtime drops before QuantizeLinear if its grid clips as they do."""


@dataclass(frozen=True)
class FloatLayer:
    """A convolution or matrix product that does not run in integers."""

    name: str
    """Its dotted name in the network."""
    operator: str
    reason: str


class Graph:
    """The nodes of a file with its constants, and who makes and who reads each tensor."""

    def __init__(self, model: "ModelProto") -> None:
        self.nodes: list[NodeProto] = list(model.graph.node)
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._maker = {output: node for node in self.nodes for output in node.output}
        self._readers: defaultdict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self._readers[name].append(node)

    @cached_property
    def computing(self) -> "list[NodeProto]":
        """The convolutions and matrix products, in order."""
        return [node for node in self.nodes if node.op_type in _COMPUTING]

    def maker(self, name: str) -> "NodeProto | None":
        """The node that makes the tensor ``name``; None for inputs and initializers."""
        return self._maker.get(name)

    def readers(self, name: str) -> "list[NodeProto]":
        """The nodes that read the tensor ``name``."""
        return self._readers[name]

    def constant(self, name: str) -> "Array | None":
        """The value of the tensor ``name`` if it is a constant, seen through casts; None if it is computed."""
        from onnx import numpy_helper

        node = self.maker(name)
        while node is not None and node.op_type == "Cast":
            name = node.input[0]
            node = self.maker(name)
        if node is not None and node.op_type == "Constant":
            return next((numpy_helper.to_array(each.t) for each in node.attribute if each.name == "value"), None)
        return numpy_helper.to_array(self._tensors[name]) if name in self._tensors else None

    def dequantized(self, name: str) -> "NodeProto | None":
        """The DequantizeLinear that the tensor ``name`` comes from, seen through nodes that only move values."""
        node = self.maker(name)
        while node is not None and node.op_type in _MOVING:
            node = self.maker(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def scale(self, node: "NodeProto") -> "Array | None":
        """The scale of a QuantizeLinear or DequantizeLinear."""
        return self.constant(node.input[1])

    def zero_point(self, node: "NodeProto") -> "Array | None":
        """The zero point of a QuantizeLinear or DequantizeLinear; None where it has none, which means 0."""
        return self.constant(node.input[2]) if len(node.input) > 2 else None

    def original(self, name: str) -> "NodeProto | None":
        """The computing node from which a runtime made its layer ``name``: they add to the name that it had."""
        names = {node.name: node for node in self.computing if node.name and name.startswith(node.name)}
        return names[max(names, key=len)] if names else None


def layer_name(node: "NodeProto") -> str:
    """The dotted name of the module that became ``node``; the node's own name if it came from none."""
    kept = next((each.value for each in node.metadata_props if each.key == "pkg.torch.onnx.name_scopes"), "[]")
    scopes = ast.literal_eval(kept)  # from the root to the node: ['', 'layer1', 'layer1.0.conv1', 'conv2d_3']
    return (scopes[-2] if len(scopes) > 1 else "") or node.name


# --- numbers ------------------------------------------------------------------------------------------------------


def bias_faults(graph: Graph) -> tuple[int, list[str]]:
    """How many int32 biases there are, and a sentence for each whose scale is not activation scale x weight scale.

    Integer kernels add a bias to sums of products, in units of exactly that product, whatever scale the file gives.
    """
    count, faults = 0, []
    for node in graph.computing:
        if len(node.input) < 3:
            continue
        makers = [graph.dequantized(name) for name in node.input[:3]]
        codes = makers[2] and graph.constant(makers[2].input[0])
        if codes is None or codes.dtype != np.int32:
            continue
        count += 1
        read, weight, found = (None if maker is None else graph.scale(maker) for maker in makers)
        if read is None or weight is None or found is None:
            faults.append(f"{layer_name(node)} has an int32 bias, and its input or weight is not quantized")
            continue
        shape = np.broadcast_shapes(found.shape, weight.shape)
        wanted = np.broadcast_to(read.astype(np.float32) * weight.astype(np.float32), shape).ravel()
        given = np.broadcast_to(found, shape).ravel()
        wrong = np.flatnonzero(wanted != given)
        if len(wrong):
            first = int(wrong[0])
            faults.append(
                f"the bias of {layer_name(node)} has scale {given[first]:.6g} in channel {first}, where activation "
                f"scale x weight scale is {wanted[first]:.6g} ({len(wrong)} of {len(given)} channels differ)"
            )
        if (zero := makers[2] and graph.zero_point(makers[2])) is not None and np.any(zero):
            faults.append(f"the bias of {layer_name(node)} has a zero point: integer kernels add it as it is")
    return count, faults


def grid_faults(graph: Graph, activations: str) -> tuple[int, list[str]]:
    """How many activations are quantized, and a sentence for each fault of their grids.

    ``activations`` is the integer type that the target's kernels want: ``uint8``, or ``int8`` with zero point 0.
    """
    quantizing = [node for node in graph.nodes if node.op_type == "QuantizeLinear"]
    strange: dict[str, list[str]] = defaultdict(list)
    faults = []
    for node in quantizing:
        scale, zero = graph.scale(node), graph.zero_point(node)
        name = node.input[0]
        if scale is None or not np.all(np.isfinite(scale) & (scale > 0)):
            faults.append(f"the scale of activation {name} is not a positive constant")
            continue
        kind = np.dtype(np.uint8) if zero is None else zero.dtype
        if kind != activations:
            strange[str(kind)].append(name)
            continue
        low, high = _integer_range(graph, node, kind)
        value = np.zeros(1) if zero is None else zero
        if not np.all((low <= value) & (value <= high)):
            faults.append(
                f"the zero point {int(value.flat[0])} of activation {name} lies outside its codes {low}..{high}"
            )
        if activations == "int8" and np.any(value):
            faults.append(
                f"the zero point {int(value.flat[0])} of activation {name} must be 0: the target is symmetric"
            )
    for kind, names in strange.items():
        some = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
        share = f"{len(names)} of {len(quantizing)} activations"
        faults.append(f"{share} are {kind} ({some}): the kernels of the target take {activations}")
    return len(quantizing), faults


def _integer_range(graph: Graph, node: "NodeProto", kind: "np.dtype[Any]") -> tuple[int, int]:
    """The codes that an activation can take: those of its type, or what an integer Clip behind it leaves."""
    info = np.iinfo(kind)
    low, high = int(info.min), int(info.max)
    for reader in graph.readers(node.output[0]):
        if reader.op_type == "Clip":
            ends = [graph.constant(name) if name else None for name in [*reader.input[1:3], "", ""][:2]]
            low = low if ends[0] is None else int(ends[0].item())
            high = high if ends[1] is None else int(ends[1].item())
    return low, high


# --- kernels ------------------------------------------------------------------------------------------------------


def left_by_onnxruntime(graph: Graph, optimised: "ModelProto") -> list[FloatLayer]:
    """The layers of ``graph`` for which ONNX Runtime took a float kernel; ``optimised`` is what it made of the file."""
    left = []
    for kernel in optimised.graph.node:
        if kernel.op_type in _FLOAT_KERNELS:
            node = graph.original(kernel.name)
            name = kernel.name if node is None else layer_name(node)
            left.append(FloatLayer(name, kernel.op_type, "ONNX Runtime made it" if node is None else _why(graph, node)))
    return left


def left_by_openvino(graph: Graph, layers: list[dict[str, str]]) -> list[FloatLayer]:
    """The same for OpenVINO, from the precision in which its layers run."""
    left = []
    for layer in layers:
        if "f" in layer["precision"]:  # f32, bf16, nf4 ...; integers are i8, u8, i4
            nodes = [node for part in layer["names"].split(",") if (node := graph.original(part)) is not None]
            name = layer_name(nodes[0]) if nodes else layer["names"].partition(",")[0]
            reason = _why(graph, nodes[0]) if nodes else "OpenVINO made it"
            left.append(FloatLayer(name, layer["type"], reason))
    return left


def _why(graph: Graph, node: "NodeProto") -> str:
    """What keeps ``node`` in float, as far as the file shows."""
    for name, what in zip(node.input[:2], ("input", "weight"), strict=False):
        if graph.dequantized(name) is None:
            return f"its {what} {name} is not quantized"
    if (clip := clipped_in_float(graph, node)) is not None:
        return f"a float {clip.op_type} stands between it and QuantizeLinear: clip the integers behind it instead"
    if node.op_type.startswith("Conv") and not _quantizes(graph, node):
        return "its output is not quantized"
    if len(node.input) > 2:
        bias = graph.dequantized(node.input[2])
        if bias is not None and any(layer_name(node) in fault for fault in bias_faults(graph)[1]):
            return "its bias scale is not activation scale x weight scale"
    return "the runtime did not fuse it"


def clipped_in_float(graph: Graph, node: "NodeProto") -> "NodeProto | None":
    """The float Clip, Min or Max through which the output of ``node`` passes before it is quantized."""
    name = node.output[0]
    while len(readers := graph.readers(name)) == 1 and readers[0].op_type in {"Relu", "Clip", "Min", "Max"}:
        if readers[0].op_type != "Relu":
            return readers[0]
        name = readers[0].output[0]
    return None


def _quantizes(graph: Graph, node: "NodeProto") -> bool:
    """Whether all that reads the output of ``node``, maybe through an activation, is a QuantizeLinear."""
    readers = graph.readers(node.output[0])
    if len(readers) == 1 and readers[0].op_type in _ACTIVATIONS:
        readers = graph.readers(readers[0].output[0])
    return bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)
