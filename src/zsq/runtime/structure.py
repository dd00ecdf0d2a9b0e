"""What the graph of an exported file says: which layers run in integers, on which grids, with which biases."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    Array = np.ndarray[Any, Any]

__all__ = [
    "FloatLayer",
    "Graph",
    "Grid",
    "Integers",
    "bias_faults",
    "grid_faults",
    "integer_faults",
    "not_between_integers",
    "not_by_onnxruntime",
    "not_by_openvino",
]

_COMPUTING = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_INTEGER_KERNELS = {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
"""What ONNX Runtime calls the kernels that multiply and add integers, in any of its domains."""
_MOVING = {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Identity", "Slice", "Gather", "Split"}
"""Operators that only pick or move values: what they make lies on the grid of what they read."""
_CLIPPING = {"Clip", "Min", "Max"}


@dataclass(frozen=True)
class FloatLayer:
    """A convolution or matrix product that does not run in integers."""

    name: str
    """Its dotted name in the network."""
    reason: str
    fault: bool = True
    """Whether the file or the runtime falls short of what was planned; if not, the runtime has its reasons."""


@dataclass(frozen=True)
class Integers:
    """What a layer of the run multiplies and adds."""

    codes: "Array"
    """Of the weight, in its shape."""
    scale: "Array"
    """Of the weight, (O,)."""
    bias: "Array | None"
    """The int32 codes (O,); None where the bias is float, or there is none."""


class Grid(NamedTuple):
    """``scale * (q - zero_point)`` for integers q in ``low .. high``."""

    scale: float
    zero_point: int
    low: int
    high: int


class Graph:
    """The nodes of a file with its constants, and who makes and who reads each tensor.

    Convolutions and matrix products have the dotted names of the layers that they were.
    """

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

    def readers(self, name: str) -> "list[NodeProto]":
        """The nodes that read the tensor ``name``."""
        return self._readers[name]

    def constant(self, name: str) -> "Array | None":
        """The value of the tensor ``name`` if it is a constant, or made of constants by Cast and Mul."""
        from onnx import helper, numpy_helper

        if name in self._tensors:
            return numpy_helper.to_array(self._tensors[name])
        node = self._maker.get(name)
        if node is None or node.op_type not in ("Cast", "Mul"):
            return None
        values = [value for each in node.input if (value := self.constant(each)) is not None]
        if len(values) < len(node.input):
            return None
        if node.op_type == "Mul":
            return values[0] * values[1]
        return values[0].astype(helper.tensor_dtype_to_np_dtype(node.attribute[0].i))

    def dequantized(self, name: str) -> "NodeProto | None":
        """The DequantizeLinear that the tensor ``name`` comes from, seen through nodes that only move values."""
        node = self._maker.get(name)
        while node is not None and node.op_type in _MOVING:
            node = self._maker.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def weight(self, node: "NodeProto") -> "Array | None":
        """The integers of the weight of a computing node; None for a float weight, and for a second activation."""
        dequantize = self.dequantized(node.input[1])
        return None if dequantize is None else self.constant(dequantize.input[0])

    def scale(self, node: "NodeProto") -> "Array | None":
        """The scale of a QuantizeLinear or DequantizeLinear; None if it is computed."""
        return self.constant(node.input[1])

    def zero_point(self, node: "NodeProto") -> "Array":
        """The zero point of a QuantizeLinear or DequantizeLinear."""
        found = self.constant(node.input[2]) if len(node.input) > 2 else None
        return np.zeros((), np.uint8) if found is None else found

    def original(self, name: str) -> "NodeProto | None":
        """The computing node from which a runtime made its layer ``name``: its own name or its output's, and more."""
        names = {each: node for node in self.computing for each in (node.output[0], node.name) if each}
        found = [each for each in names if name.startswith(each)]
        return names[max(found, key=len)] if found else None


# --- numbers ------------------------------------------------------------------------------------------------------


def integer_faults(graph: Graph, wanted: Mapping[str, Integers]) -> list[str]:
    """A sentence for each layer whose weight or bias in the file has not the integers of the run."""
    faults = []
    nodes = {node.name: node for node in graph.computing}
    for name, integers in wanted.items():
        weight, bias = [*nodes[name].input, ""][1:3] if name in nodes else ("", "")
        if (held := graph.dequantized(weight)) is not None:  # what is float is told elsewhere
            found, scale = graph.weight(nodes[name]), graph.scale(held)
            equal = found is not None and any(
                np.array_equal(found, each) for each in (integers.codes, integers.codes.T)
            )
            if not equal or scale is None or np.any(scale != integers.scale):
                faults.append(f"the weight of {name} is not that of the run")
        if integers.bias is not None and (held := graph.dequantized(bias)) is not None:
            found = graph.constant(held.input[0])
            if found is None or not np.array_equal(found, integers.bias):
                faults.append(f"the bias of {name} is not that of the run")
    return faults


def bias_faults(graph: Graph) -> tuple[int, dict[str, str]]:
    """How many int32 biases there are, and a sentence by layer for those whose scale is wrong.

    Integer kernels add a bias to a sum of products of codes, in units of activation scale x weight scale, whatever
    scale the file gives: it must be exactly that.
    """
    count, faults = 0, {}
    for node in graph.computing:
        bias = graph.dequantized(node.input[2]) if len(node.input) > 2 else None
        codes = None if bias is None else graph.constant(bias.input[0])
        if bias is None or codes is None or codes.dtype != np.int32:
            continue
        count += 1
        read, weight = (graph.dequantized(name) for name in node.input[:2])
        if read is None or weight is None:
            continue  # then it is float, which is told elsewhere
        found, *factors = (graph.scale(each) for each in (bias, read, weight))
        if found is None or factors[0] is None or factors[1] is None:
            faults[node.name] = f"the bias of {node.name} has a scale that is not a constant"
            continue
        wanted = np.asarray(factors[0] * factors[1], np.float32)
        wanted, found = np.broadcast_arrays(wanted, found)
        wrong = np.flatnonzero(wanted != found)
        if len(wrong):
            first = int(wrong[0])
            faults[node.name] = (
                f"the bias of {node.name} has scale {found.flat[first]:.6g} in channel {first}, where activation scale "
                f"x weight scale is {wanted.flat[first]:.6g} ({len(wrong)} of {wanted.size} channels differ)"
            )
        elif np.any(graph.zero_point(bias)):
            faults[node.name] = f"the bias of {node.name} has a zero point, which integer kernels do not subtract"
    return count, faults


def grid_faults(graph: Graph, activations: str, wanted: Sequence[Grid]) -> list[str]:
    """A sentence for each fault of the grids of activations.

    ``activations`` is the integer type that the target's kernels take: ``uint8``, or ``int8`` with zero point 0;
    ``wanted`` are the grids of the run.
    """
    quantizing = [node for node in graph.nodes if node.op_type == "QuantizeLinear"]
    strange: defaultdict[str, list[str]] = defaultdict(list)
    faults = []
    grids: Counter[Grid] = Counter()
    for node in quantizing:
        name, scale, zero = _activation_name(node), graph.scale(node), graph.zero_point(node)
        if scale is None or scale.size != 1 or not np.all(np.isfinite(scale) & (scale > 0)):
            faults.append(f"the scale of activation {name} is not one positive constant")
            continue
        if zero.dtype != activations:
            strange[str(zero.dtype)].append(name)
            continue
        low, high = _integer_range(graph, node)
        grids[Grid(float(scale.item()), int(zero.item()), low, high)] += 1
        if not low <= zero <= high:
            faults.append(f"the zero point {zero} of activation {name} lies outside its integers {low}..{high}")
        elif activations == "int8" and zero != 0:
            faults.append(f"the zero point {zero} of activation {name} is not 0: the target is symmetric")
    for kind, names in strange.items():
        some = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
        share = f"{len(names)} of {len(quantizing)} activations"
        faults.append(f"{share} are {kind} ({some}): the kernels of the target take {activations}")
    if not faults and (missing := Counter(wanted) - grids):
        faults.append(
            f"{missing.total()} of the run's {len(wanted)} grids are not in the file, such as {next(iter(missing))}"
        )
    return faults


def _activation_name(node: "NodeProto") -> str:
    """What a sentence calls the activation that ``node`` quantizes: by its scale, which an exported file names."""
    name: str = node.input[1]
    return name.removeprefix("activation_quantizers.").removesuffix(".scale")


def _integer_range(graph: Graph, node: "NodeProto") -> tuple[int, int]:
    """The integers that an activation can take: those of its type, or what a Clip behind it leaves."""
    whole = np.iinfo(graph.zero_point(node).dtype)
    ends = [int(whole.min), int(whole.max)]
    for reader in graph.readers(node.output[0]):
        if reader.op_type == "Clip":
            for index, name in enumerate(reader.input[1:3]):
                found = graph.constant(name) if name else None
                ends[index] = ends[index] if found is None else int(found.item())
    return ends[0], ends[1]


# --- kernels ------------------------------------------------------------------------------------------------------


def not_between_integers(graph: Graph) -> list[FloatLayer]:
    """The layers that do not read integers on both sides; what any runtime needs."""
    reasons = ((layer_name(node), _unquantized(graph, node)) for node in graph.computing)
    return [FloatLayer(name, reason) for name, reason in reasons if reason is not None]


def not_by_onnxruntime(graph: Graph, optimised: "ModelProto") -> list[FloatLayer]:
    """The layers for which ONNX Runtime took no integer kernel; ``optimised`` is what it made of the file."""
    kernels = [node.name for node in optimised.graph.node if node.op_type in _INTEGER_KERNELS]
    reasons = {layer_name(node): _why_float(graph, node) for node in _without(graph, kernels)}
    return [FloatLayer(name, reason or "ONNX Runtime took no integer kernel") for name, reason in reasons.items()]


def not_by_openvino(graph: Graph, layers: list[dict[str, str]]) -> list[FloatLayer]:
    """The same for OpenVINO, from the precision in which its layers run: i8 and u8, or f32, bf16 ...

    Products of two activations are no fault of the file: OpenVINO multiplies them in integers only at some places, and
    where it fuses attention into one kernel it does not tell.
    """
    integer = [layer for layer in layers if "f" not in layer["precision"]]
    fused = {node.name for name in _names(layers, "Subgraph") if (node := graph.original(name)) is not None}
    left = []
    for node in _without(graph, _names(integer)):
        reason = _why_float(graph, node)
        if reason is None and graph.weight(node) is None:
            how = (
                "fuses it into a kernel that does not tell"
                if node.name in fused
                else "multiplies its activations in float"
            )
            left.append(FloatLayer(layer_name(node), f"OpenVINO {how}", fault=False))
        else:
            left.append(FloatLayer(layer_name(node), reason or "OpenVINO took no integer kernel"))
    return left


def _names(layers: list[dict[str, str]], kind: str = "") -> list[str]:
    """The names that the nodes of ``layers`` had, of one ``kind`` or of all."""
    return [name for layer in layers if kind in layer["type"] for name in layer["names"].split(",")]


def _without(graph: Graph, kernels: list[str]) -> "list[NodeProto]":
    """The computing nodes from which none of the integer ``kernels`` was made."""
    made = {node.name for kernel in kernels if (node := graph.original(kernel)) is not None}
    return [node for node in graph.computing if node.name not in made]


def layer_name(node: "NodeProto") -> str:
    """The dotted name of a layer; a product, which is no layer, is called as in the graph that was exported."""
    name: str = node.name
    return name.removeprefix("node_")


def _why_float(graph: Graph, node: "NodeProto") -> str | None:
    """What keeps ``node`` in float, as far as the file shows."""
    if (reason := _unquantized(graph, node)) is not None:
        return reason
    read, *more = graph.readers(node.output[0]) or [node]
    while not more and read.op_type in {"Relu", *_CLIPPING}:
        if read.op_type in _CLIPPING:
            return f"a float {read.op_type} stands between it and QuantizeLinear: clip the integers behind that instead"
        read, *more = graph.readers(read.output[0]) or [node]
    if node.op_type == "Conv" and any(reader.op_type != "QuantizeLinear" for reader in (read, *more)):
        return "its output is not quantized"
    return "its bias has another scale" if node.name in bias_faults(graph)[1] else None


def _unquantized(graph: Graph, node: "NodeProto") -> str | None:
    for name, what in zip(node.input[:2], ("input", "weight"), strict=True):
        if graph.dequantized(name) is None:
            return f"its {what} is not quantized"
    return None
