"""Where quantizers sit: edges of the graph, the widths at its two ends, and the protocols that papers report under."""

import operator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import fx, nn
from torch.nn import functional as F

from zsq.core import FLOAT, Recipe, RecipeError
from zsq.nets.clip import ChannelClip
from zsq.nets.graph import consumers, hidden_layers, layers, matmuls, module_of, preserves_value
from zsq.quant.grid import PerChannel, PerTensor, Scheme
from zsq.quant.quantizers import ActivationQuantizer

__all__ = [
    "MINMAX_PTQ",
    "PROTOCOLS",
    "PTQ_8BIT_ENDS",
    "QAT_LOWBIT_ALL",
    "SIMULATE_ALL",
    "AfterActivations",
    "Edge",
    "Ends",
    "EveryEdge",
    "LayerInputs",
    "Placement",
    "QuantizationProtocol",
    "float_tensors",
    "is_activation",
    "moves_values",
    "seen_through",
]

_ACTIVATION_FUNCTIONS = {F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.leaky_relu, F.mish, F.elu, F.sigmoid}
_ACTIVATION_FUNCTIONS |= {F.hardsigmoid, F.hardtanh, torch.relu, torch.sigmoid, torch.tanh}
_ACTIVATION_METHODS = {"relu", "relu_", "sigmoid", "tanh"}
_NOT_ELEMENTWISE = (nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.MultiheadAttention)
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ARITHMETIC = {*_ADDS, operator.mul, operator.sub, torch.mul, torch.sub, torch.cat, torch.concat, torch.stack, "mul"}


class Edge(NamedTuple):
    """A value, and the nodes that shall read it quantized. They share one quantizer: they read one tensor."""

    source: fx.Node
    readers: tuple[fx.Node, ...]


class Placement(Protocol):
    """A rule that picks the edges to quantize."""

    def edges(self, graph: fx.GraphModule) -> list[Edge]:
        """The edges in topological order, one for each source."""


@dataclass(frozen=True, kw_only=True)
class AfterActivations(Recipe):
    """The outputs of ReLU and the other activation functions, whoever reads them; nothing else (ZeroQ, GDFQ family)."""

    def edges(self, graph: fx.GraphModule) -> list[Edge]:
        """One edge an activation function."""
        return [Edge(node, tuple(node.users)) for node in graph.graph.nodes if is_activation(node) and node.users]


@dataclass(frozen=True, kw_only=True)
class LayerInputs(Recipe):
    """The inputs of layers and matrix products; a shortcut that reads the same tensor reads it quantized too."""

    def edges(self, graph: fx.GraphModule) -> list[Edge]:
        """One edge for each tensor that a layer reads."""
        computing = {*layers(graph), *(product.node for product in matmuls(graph))}

        def reads(user: fx.Node) -> bool:
            """Whether ``user`` computes with the tensor or adds it up, maybe through an identity."""
            return any(end in computing or end.target in _ADDS for end in seen_through(user))

        return [
            Edge(node, tuple(user for user in node.users if reads(user)))
            for node in graph.graph.nodes
            if "shape" in node.meta and node.op != "get_attr" and not preserves_value(node)
            if any(end in computing for user in node.users for end in seen_through(user))
        ]


@dataclass(frozen=True, kw_only=True)
class EveryEdge(Recipe):
    """Every computed tensor once: the input, each layer after its normalisation and activation, sums, pools ..."""

    def edges(self, graph: fx.GraphModule) -> list[Edge]:
        """One edge for each tensor that is not taken up at once by a normalisation, an activation or a view."""
        return [
            Edge(node, readers)
            for node in graph.graph.nodes
            if "shape" in node.meta and node.op not in ("get_attr", "output") and not moves_values(node)
            if (readers := tuple(user for user in node.users if user.op != "output" and not _fuses(node, user)))
        ]


@dataclass(frozen=True, kw_only=True)
class Ends(Recipe):
    """Widths in bits that differ at the two ends of a network; None is the width of all others, 32 is float."""

    first_weights: int | None = None
    first_input: int | None = None
    second_input: int | None = None
    last_weights: int | None = None
    last_input: int | None = None

    def __post_init__(self) -> None:
        for name, bits in self.parts().items():
            if bits is not None and bits != FLOAT and not 2 <= bits <= 8:
                raise RecipeError(f"Ends.{name} must have 2 to 8 bits, 32 for float, or None, got {bits}")

    def weights(self, position: int, count: int, bits: int) -> int:
        """The width of the weights of layer ``position`` of ``count`` where all others have ``bits``."""
        own = self.first_weights if position == 0 else self.last_weights if position == count - 1 else None
        return bits if own is None else own

    def inputs(self, position: int, count: int, bits: int) -> int:
        """The width of the input of layer ``position``; a network of two layers has a first and a last."""
        if position == 0:
            own = self.first_input
        elif position == count - 1:
            own = self.last_input
        else:
            own = self.second_input if position == 1 else None
        return bits if own is None else own


@dataclass(frozen=True, kw_only=True)
class QuantizationProtocol(Recipe):
    """Under which conditions an accuracy was measured; stored with every result."""

    name: str
    placement: Placement
    ends: Ends = Ends()
    weights: Scheme = Scheme(granularity=PerChannel())
    activations: Scheme = Scheme(granularity=PerTensor())
    fold: bool = False
    """Fold BatchNorm into the layers before quantizing them."""


MINMAX_PTQ = QuantizationProtocol(name="minmax-ptq", placement=AfterActivations())
PTQ_8BIT_ENDS = QuantizationProtocol(
    name="ptq-8bit-ends",
    placement=LayerInputs(),
    ends=Ends(first_weights=8, first_input=FLOAT, second_input=8, last_weights=8, last_input=8),
    activations=Scheme(symmetric=True, granularity=PerTensor()),
)
QAT_LOWBIT_ALL = QuantizationProtocol(name="qat-lowbit-all", placement=AfterActivations())
SIMULATE_ALL = QuantizationProtocol(name="simulate-all", placement=EveryEdge(), fold=True)

PROTOCOLS = {protocol.name: protocol for protocol in (MINMAX_PTQ, PTQ_8BIT_ENDS, QAT_LOWBIT_ALL, SIMULATE_ALL)}


def is_activation(node: fx.Node) -> bool:
    """Whether ``node`` is an elementwise activation function, as a module, a function or a method."""
    module = module_of(node)
    if module is not None:
        known = type(module).__module__ == "torch.nn.modules.activation" or isinstance(module, ChannelClip)
        return known and not isinstance(module, _NOT_ELEMENTWISE)
    return node.target in (_ACTIVATION_FUNCTIONS if node.op == "call_function" else _ACTIVATION_METHODS)


def float_tensors(graph: fx.GraphModule) -> list[str]:
    """The operands of layers, products, sums and concatenations that no quantizer touches, as ``reader <- value``.

    The input of a layer inside an untraced module counts as quantized once the range of its quantizer is known.
    """
    readers = [*layers(graph), *(product.node for product in matmuls(graph))]
    readers += [node for node in graph.graph.nodes if node.target in _ARITHMETIC]
    left = []
    for reader in dict.fromkeys(readers):
        for source in reader.all_input_nodes:
            origin = source
            while moves_values(origin) and origin.all_input_nodes:
                origin = origin.all_input_nodes[0]
            quantized = isinstance(module_of(origin), ActivationQuantizer)
            if "shape" in source.meta and origin.op != "get_attr" and not quantized:
                left.append(f"{_label(reader)} <- {_label(source)}")
    hidden = {name: getattr(layer, "input_quantizer", None) for name, layer in hidden_layers(graph).items()}
    return left + [f"{name} <- input" for name, each in hidden.items() if each is None or not each.ready]


def seen_through(user: fx.Node) -> list[fx.Node]:
    """``user``, or what reads it if it only passes the value on."""
    return consumers(user) if preserves_value(user) else [user]


def _fuses(node: fx.Node, user: fx.Node) -> bool:
    """Whether ``user`` is computed together with ``node`` on real hardware, so that no tensor lies between them."""
    if moves_values(user):
        return False
    layer_before = module_of(node) is not None and node in layers(user.graph.owning_module)  # type: ignore[arg-type]  # owned
    norm = isinstance(module_of(user), nn.modules.batchnorm._BatchNorm)
    return (layer_before and norm) or (is_activation(user) and len(node.users) == 1 and node.op != "placeholder")


_MOVING_METHODS = {"view", "reshape", "flatten", "permute", "transpose", "unsqueeze", "squeeze", "contiguous", "chunk"}
_MOVING_FUNCTIONS = {torch.flatten, torch.permute, torch.transpose, torch.unsqueeze, torch.squeeze, torch.reshape}
_MOVING_FUNCTIONS |= {operator.getitem, torch.chunk, torch.split, F.max_pool2d, torch.roll, F.pad}
_MOVING_MODULES = (nn.Flatten, nn.Unflatten, nn.MaxPool2d, nn.ChannelShuffle, nn.ZeroPad2d)


def moves_values(node: fx.Node) -> bool:
    """Whether ``node`` only picks or moves values: what it makes lies on the grid of what it reads."""
    if preserves_value(node) or isinstance(module_of(node), _MOVING_MODULES):
        return True
    return node.target in (_MOVING_METHODS if node.op == "call_method" else _MOVING_FUNCTIONS)


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name
