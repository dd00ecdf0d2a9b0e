"""Where quantizers sit: edges of the graph, the widths at its two ends, and the protocols that papers report under."""

import copy
import operator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from zsq.core import FLOAT, Recipe, RecipeError
from zsq.nets.chains import clip_limits
from zsq.nets.clip import ChannelClip
from zsq.nets.graph import consumers, hidden_layers, layers, matmuls, module_of, preserves_value, producer
from zsq.nets.tracing import asks_size, perform
from zsq.quant.grid import Grid, PerChannel, PerTensor, Scheme
from zsq.quant.nonuniform import LogSqrt2
from zsq.quant.quantizers import ActivationQuantizer

__all__ = [
    "DEPLOYED",
    "DEPLOY_VIT",
    "MINMAX_PTQ",
    "MINMAX_VIT",
    "PROTOCOLS",
    "PTQ_8BIT_ENDS",
    "QAT_LOWBIT_ALL",
    "REPQ_VIT",
    "SIMULATE_ALL",
    "AfterActivations",
    "Edge",
    "Ends",
    "EveryEdge",
    "IntegerKernels",
    "LayerInputs",
    "Placement",
    "QuantizationProtocol",
    "float_tensors",
    "is_activation",
    "made_by",
    "moved_to",
    "moves_values",
    "normalized_linears",
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

    logits: bool = False
    """Also what the network puts out."""
    constants: bool = False
    """Also parameters that are added: position embeddings, tables of position biases."""

    def edges(self, graph: fx.GraphModule) -> list[Edge]:
        """One edge for each tensor that is not taken up at once by a normalisation, an activation, a view or a mask."""
        return [
            Edge(node, readers)
            for node in graph.graph.nodes
            if "shape" in node.meta and node.op != "output" and not _keeps_grid(node) and not _masks(node)
            if node.op != "get_attr" or (self.constants and _is_parameter(node) and _is_added(node))
            if (readers := tuple(user for user in node.users if self._reads(node, user)))
        ]

    def _reads(self, node: fx.Node, user: fx.Node) -> bool:
        return self.logits if user.op == "output" else not _fuses(node, user)


@dataclass(frozen=True, kw_only=True)
class IntegerKernels(Recipe):
    """What the integer kernels of inference runtimes read and write: their inputs, and the maps between convolutions.

    A convolution runs in integers only if its output is quantized too; a ReLU or clip behind it comes first, and is
    part of the grid. From convolution to convolution the sums, products, pools and concatenations are quantized as
    well; the parts of a concatenation take the grid of the whole. Among tokens only what a linear or a matrix product
    reads is quantized: softmax, GELU, LayerNorm and sums stay float, and so does the convolution that makes the tokens,
    which one runtime computes wrong in integers.
    """

    def edges(self, graph: fx.GraphModule) -> list[Edge]:
        """One edge for each tensor that an integer kernel reads or writes."""
        computing = {*layers(graph), *(product.node for product in matmuls(graph))}
        computing -= {node for node in computing if _makes_tokens(node)}
        maps = _maps(graph, computing)

        def readers(node: fx.Node) -> tuple[fx.Node, ...]:
            """Who reads ``node`` quantized."""
            if node not in maps:
                return tuple(user for user in node.users if any(end in computing for end in seen_through(user)))
            if isinstance(module_of(node), _ConvNd):
                return () if _clips_alone(node) or _joined_alone(node) else tuple(node.users)
            if _clips_alone(node) or _joined_alone(node) or (_is_linear(node) and _activated_alone(node)):
                return ()
            return tuple(user for user in node.users if _is_computed_with(user))

        tensors = [node for node in graph.graph.nodes if "shape" in node.meta and node.op not in ("get_attr", "output")]
        sources = [node for node in tensors if not (moves_values(node) if node in maps else preserves_value(node))]
        return [Edge(node, found) for node in sources if (found := readers(node))]


@dataclass(frozen=True, kw_only=True)
class Ends(Recipe):
    """Widths in bits that differ at the two ends of a network; None is the width of all others, 32 is float."""

    first_weights: int | None = None
    first_input: int | None = None
    second_input: int | None = None
    last_weights: int | None = None
    last_input: int | None = None
    unread: int | None = None
    """Of tensors that no layer and no matrix product reads, such as the branch of a sum."""

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
    probabilities: Grid | Literal["float"] | None = None
    """What a softmax makes; None is as all other activations."""
    gelus: Grid | Literal["float"] | None = None
    """What a GELU makes."""
    norms: Grid | Literal["float"] | None = None
    """What a LayerNorm makes where only linears read it."""
    pixels: Literal["seen", "possible"] = "seen"
    """What the range of the images' quantizer holds: images that are seen, or also all values that pixels can have."""
    fold: bool = False
    """Fold BatchNorm into the layers before quantizing them."""

    def grid(self, source: fx.Node) -> Grid | None:
        """What a quantizer of ``source`` rounds to; None where it stays float."""
        origin = made_by(source)
        chosen: Grid | Literal["float"] | None = None
        if _is_softmax(origin):
            chosen = self.probabilities
        elif isinstance(module_of(origin), nn.GELU) or origin.target is F.gelu:
            chosen = self.gelus
        elif normalized_linears(origin):
            chosen = self.norms
        return None if chosen == "float" else chosen or self.activations


MINMAX_PTQ = QuantizationProtocol(name="minmax-ptq", placement=AfterActivations())
PTQ_8BIT_ENDS = QuantizationProtocol(
    name="ptq-8bit-ends",
    placement=LayerInputs(),
    ends=Ends(first_weights=8, first_input=FLOAT, second_input=8, last_weights=8, last_input=8),
    activations=Scheme(symmetric=True, granularity=PerTensor()),
)
QAT_LOWBIT_ALL = QuantizationProtocol(name="qat-lowbit-all", placement=AfterActivations())
SIMULATE_ALL = QuantizationProtocol(name="simulate-all", placement=EveryEdge(), fold=True)
_DEPLOYED = QuantizationProtocol(
    name="ort-x86",
    placement=IntegerKernels(),
    ends=Ends(first_weights=8, first_input=8, last_weights=8, last_input=8, unread=8),  # next to nothing in bytes
    weights=Scheme(symmetric=True, granularity=PerChannel()),
    pixels="possible",
    fold=True,
)
DEPLOYED = {
    "ort-x86": _DEPLOYED,
    "openvino": replace(_DEPLOYED, name="openvino"),
    "tensorrt": replace(_DEPLOYED, name="tensorrt", activations=Scheme(symmetric=True, signed=True)),
    "pt2e-x86": replace(_DEPLOYED, name="pt2e-x86"),
}
"""Where a target of ``zsq.export`` wants quantizers, by its name."""

MINMAX_VIT = QuantizationProtocol(
    name="minmax-vit",
    placement=EveryEdge(logits=True, constants=True),
    weights=Scheme(symmetric=True, granularity=PerChannel()),
    probabilities="float",
    pixels="possible",
)
REPQ_VIT = QuantizationProtocol(
    name="repq-vit",
    placement=LayerInputs(),
    ends=Ends(first_input=8),
    probabilities=LogSqrt2(),
    norms=Scheme(granularity=PerChannel()),
    pixels="possible",
)
DEPLOY_VIT = QuantizationProtocol(
    name="deploy-vit",
    placement=LayerInputs(),
    ends=Ends(first_weights=FLOAT, first_input=FLOAT),
    weights=Scheme(symmetric=True, granularity=PerChannel()),
    fold=True,
)

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (MINMAX_PTQ, PTQ_8BIT_ENDS, QAT_LOWBIT_ALL, SIMULATE_ALL, MINMAX_VIT, REPQ_VIT, DEPLOY_VIT)
}
PROTOCOLS |= DEPLOYED | {"deploy": _DEPLOYED}


def is_activation(node: fx.Node) -> bool:
    """Whether ``node`` is an elementwise activation function, as a module, a function or a method."""
    module = module_of(node)
    if module is not None:
        known = type(module).__module__ == "torch.nn.modules.activation" or isinstance(module, ChannelClip)
        return known and not isinstance(module, _NOT_ELEMENTWISE)
    return node.target in (_ACTIVATION_FUNCTIONS if node.op == "call_function" else _ACTIVATION_METHODS)


def float_tensors(graph: fx.GraphModule) -> list[str]:
    """The operands of layers, products, sums, LayerNorm and so on that no quantizer touches, as ``reader <- value``.

    The input of a layer inside an untraced module counts as quantized once the range of its quantizer is known.
    """
    readers = [*layers(graph), *(product.node for product in matmuls(graph))]
    readers += [node for node in graph.graph.nodes if node.target in _ARITHMETIC or _is_softmax(node)]
    readers += [node for node in graph.graph.nodes if isinstance(module_of(node), nn.LayerNorm)]
    left = []
    for reader in dict.fromkeys(readers):
        if reader.target in _CONCATENATIONS and all(
            isinstance(module_of(user), ActivationQuantizer) for user in reader.users
        ):
            continue  # rounding acts on each number alone, before or after they are joined
        for source in reader.all_input_nodes:
            origin = source
            while (_keeps_grid(origin) or _masks(origin)) and origin.all_input_nodes:
                origin = origin.all_input_nodes[0]
            quantized = isinstance(module_of(origin), ActivationQuantizer)
            if "shape" in source.meta and origin.op != "get_attr" and not quantized:
                left.append(f"{_label(reader)} <- {_label(_seen_back(source))}")
    hidden = {name: getattr(layer, "input_quantizer", None) for name, layer in hidden_layers(graph).items()}
    return left + [f"{name} <- input" for name, each in hidden.items() if each is None or not each.ready]


def seen_through(user: fx.Node) -> list[fx.Node]:
    """``user``, or what reads it if it only passes the value on."""
    return consumers(user) if preserves_value(user) else [user]


def moved_to(user: fx.Node) -> list[fx.Node]:
    """``user``, or what reads its values behind it if it only moves them."""
    return [end for each in user.users for end in moved_to(each)] if moves_values(user) else [user]


def _fuses(node: fx.Node, user: fx.Node) -> bool:
    """Whether ``user`` is computed together with ``node`` on real hardware, so that no tensor lies between them."""
    if moves_values(user):
        return False
    layer_before = module_of(node) is not None and node in layers(user.graph.owning_module)  # type: ignore[arg-type]  # owned
    norm = isinstance(module_of(user), nn.modules.batchnorm._BatchNorm)
    return (layer_before and norm) or (is_activation(user) and len(node.users) == 1 and node.op != "placeholder")


_CONCATENATIONS = {torch.cat, torch.concat}
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_POOL_FUNCTIONS = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool2d, torch.mean, "mean"}


def _maps(graph: fx.GraphModule, computing: set[fx.Node]) -> set[fx.Node]:
    """The nodes whose values integer convolutions made, directly or through what computes with their outputs alone."""
    maps: set[fx.Node] = set()
    for node in graph.graph.nodes:
        values = [each for each in node.all_input_nodes if each.op != "get_attr"]
        operands = [each for each in values if "shape" in each.meta or moves_values(each)]  # parts of a split have none
        module = module_of(node)
        if isinstance(module, _ConvNd):
            made = node in computing
        else:
            passes = is_activation(node) or moves_values(node) or isinstance(module, (nn.Linear, *_POOLS))
            passes = passes or node.target in _ARITHMETIC or node.target in _POOL_FUNCTIONS
            made = passes and bool(operands) and all(each in maps for each in operands)
        if made:
            maps.add(node)
    return maps


def _makes_tokens(node: fx.Node) -> bool:
    """Whether ``node`` is a convolution whose pixels become a sequence, or an image's patches with channels last."""
    if not isinstance(module_of(node), _ConvNd) or not node.users:
        return False
    return all(_unrolls(user, first=node.all_input_nodes[0].op == "placeholder") for user in node.users)


def _unrolls(node: fx.Node, first: bool) -> bool:
    """Whether ``node`` moves the pixels of a map (N, C, H, W): into (N, T, D) or the like, or if ``first`` at all."""
    if not moves_values(node) or isinstance(module_of(node), nn.MaxPool2d) or "shape" not in node.meta:
        return False
    before, after = node.all_input_nodes[0].meta["shape"], node.meta["shape"]
    if preserves_value(node):
        return bool(node.users) and all(_unrolls(user, first) for user in node.users)
    return (len(after) == 3 and before[-1] * before[-2] > 1) or (first and len(after) == 4 and after != before)


def _clips_alone(node: fx.Node) -> bool:
    """Whether a ReLU or a clip from 0 is all that reads ``node``."""
    return len(node.users) == 1 and all(clip_limits(user) is not None for user in node.users)


def _activated_alone(node: fx.Node) -> bool:
    return len(node.users) == 1 and all(is_activation(user) for user in node.users)


def _joined_alone(node: fx.Node) -> bool:
    """Whether a concatenation is all that reads ``node``."""
    return len(node.users) == 1 and all(user.target in _CONCATENATIONS for user in node.users)


def _is_linear(node: fx.Node) -> bool:
    return isinstance(module_of(node), nn.Linear)


def _is_computed_with(user: fx.Node) -> bool:
    """Whether anything is computed with the value that ``user`` reads, or it is only moved to the output."""
    return user.op != "output" and (not moves_values(user) or any(_is_computed_with(each) for each in user.users))


_MOVING_METHODS = {"view", "reshape", "flatten", "permute", "transpose", "unsqueeze", "squeeze", "contiguous", "chunk"}
_MOVING_METHODS |= {"unbind", "split", "expand", "select", "roll", "unflatten"}
_MOVING_FUNCTIONS = {torch.flatten, torch.permute, torch.transpose, torch.unsqueeze, torch.squeeze, torch.reshape}
_MOVING_FUNCTIONS |= {operator.getitem, torch.chunk, torch.split, torch.unbind, F.max_pool2d, torch.roll, F.pad}
_MOVING_MODULES = (nn.Flatten, nn.Unflatten, nn.MaxPool2d, nn.ChannelShuffle, nn.ZeroPad2d)


def moves_values(node: fx.Node) -> bool:
    """Whether ``node`` only picks or moves values: what it makes lies on the grid of what it reads."""
    if preserves_value(node) or isinstance(module_of(node), _MOVING_MODULES):
        return True
    return node.target in (_MOVING_METHODS if node.op == "call_method" else _MOVING_FUNCTIONS)


def _keeps_grid(node: fx.Node) -> bool:
    """Whether what ``node`` makes lies on the grid of what it reads, or on that grid times one number."""
    scales = node.target in (operator.mul, torch.mul, operator.truediv, torch.div) and isinstance(node.args[0], fx.Node)
    return moves_values(node) or (scales and isinstance(node.args[1], int | float))


def made_by(node: fx.Node) -> fx.Node:
    """The node that computes the values of ``node``, seen through all that only moves them."""
    while moves_values(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def normalized_linears(node: fx.Node) -> list[fx.Node]:
    """The linears that read the channels of the LayerNorm ``node``, if nothing else reads them; quantized or not.

    Found by a probe: with weights 0 and biases 1 .. C the LayerNorm puts out the numbers of the channels, and these
    must arrive along the last dimension of every reader. So views, rolls and permutations may lie between, but no
    padding; and no selection, as of one token, whose few values say little about the range of a channel.
    """
    norm = module_of(node)
    if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
        return []
    graph = node.graph.owning_module
    assert graph is not None
    numbered = copy.deepcopy(norm).cpu()
    numbers = torch.arange(1.0, norm.normalized_shape[0] + 1)
    numbered.weight, numbered.bias = nn.Parameter(torch.zeros_like(numbers)), nn.Parameter(numbers)
    found = []
    with torch.no_grad():
        values: dict[fx.Node, Any] = {node: numbered(torch.zeros(node.all_input_nodes[0].meta["shape"]))}
        for reader in node.graph.nodes:
            inputs = reader.all_input_nodes
            if not any(each in values for each in inputs):
                continue
            value: Any = values.get(inputs[0])
            if isinstance(module_of(reader), nn.Linear):
                if value.shape[-1:] != numbers.shape or not torch.equal(value, numbers.expand_as(value)):
                    return []
                found.append(reader)
            elif isinstance(module_of(reader), ActivationQuantizer):
                values[reader] = value
            elif all(each in values for each in inputs) and (asks_size(reader) or _rearranges(reader, value)):
                args, kwargs = (fx.node.map_arg(each, values.__getitem__) for each in (reader.args, reader.kwargs))
                values[reader] = perform(reader, graph, args, kwargs)
            else:
                return []
    return found


def _rearranges(node: fx.Node, value: Any) -> bool:
    """Whether ``node`` moves all of ``value``, or takes a number out of its size."""
    return moves_values(node) and (node.target is not operator.getitem or not isinstance(value, Tensor))


def _is_softmax(node: fx.Node) -> bool:
    return isinstance(module_of(node), nn.Softmax) or node.target in (torch.softmax, F.softmax, "softmax")


def _is_parameter(node: fx.Node) -> bool:
    return isinstance(operator.attrgetter(str(node.target))(node.graph.owning_module), nn.Parameter)


def _is_added(node: fx.Node) -> bool:
    return any(user.target in _ADDS or (moves_values(user) and _is_added(user)) for user in node.users)


_HIDDEN_SCORE = -100.0
"""What a mask adds to an attention score, or less, so that its probability is 0 (Swin; others add infinity)."""


def _masks(node: fx.Node) -> bool:
    """Whether ``node`` hides attention scores: a range that holds what it writes would have no resolution left."""
    if node.target in ("masked_fill", torch.masked_fill):
        return True
    constants = [made_by(each) for each in node.all_input_nodes] if node.target in _ADDS else []
    values = [
        operator.attrgetter(str(each.target))(node.graph.owning_module) for each in constants if each.op == "get_attr"
    ]
    return any(value.min() <= _HIDDEN_SCORE for value in values)


def _seen_back(node: fx.Node) -> fx.Node:
    return producer(node) if preserves_value(node) else node


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name
