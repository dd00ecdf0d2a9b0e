"""A frozen student as a graph of integers: what a file holds, in operations that each format spells its own way.

No value changes: every grid is the student's, every weight is what the student computes with. What changes is where
a grid is written down. A ReLU or clip before a quantizer becomes the limits of its integers, a pool or view repeats
the grid of what it reads, the parts of a concatenation take the grid of the whole, and a BatchNorm that was not
folded goes into the scales of the weights.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from zsq.core import UnsupportedModel
from zsq.export.targets import Target
from zsq.nets.chains import clip_limits
from zsq.nets.graph import consumers, layers, module_of, preserves_value, producer
from zsq.quant.placement import moves_values
from zsq.quant.quantizers import ActivationQuantizer, weight_quantizer

__all__ = ["Dialect", "IntegerActivation", "IntegerBias", "IntegerWeight", "integer_weight", "lower", "why_float"]

_INT32 = 2**31 - 1
_CONCATENATIONS = {torch.cat, torch.concat}


class Dialect(Protocol):
    """How a format spells the two conversions."""

    def convert(self, x: Tensor, grid: "IntegerActivation") -> Tensor:
        """Float ``x`` as integers of ``grid``, and back."""

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
        """``(codes - zero_point) * scale``, with ``scale`` and ``zero_point`` (C,) along ``axis``."""


class IntegerActivation(nn.Module):
    """A value on the grid ``scale * (q - zero_point)``, with integers q in ``low .. high`` of an 8-bit type."""

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, scale: Tensor, zero_point: int, low: int, high: int, dtype: torch.dtype, ops: Dialect) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().float().clone())
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=dtype))
        self.register_buffer("low", torch.tensor(low, dtype=dtype))
        self.register_buffer("high", torch.tensor(high, dtype=dtype))
        self.step, self.limits = float(scale), (zero_point, low, high)
        """The same as plain numbers."""
        self.clips = (low, high) != (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        """Whether the grid is narrower than its type."""
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape on the grid."""
        return self.ops.convert(x, self)


class IntegerWeight(nn.Module):
    """The weight of a layer as int8 ``codes`` and a ``scale`` (O,), one an output channel; a parametrization."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, axis: int, ops: Dialect) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(scale.shape, dtype=codes.dtype))  # kernels ask for it
        self.axis, self.ops = axis, ops

    def forward(self, _: Tensor) -> Tensor:
        """The weight, in float."""
        return self.ops.dequantize(self.codes, self.scale, self.zero_point, self.axis)


class IntegerBias(IntegerWeight):
    """The bias (O,) of a layer as int32 ``codes`` at activation scale x weight scale."""


def lower(student: fx.GraphModule, target: Target, ops: Dialect) -> fx.GraphModule:
    """A copy of ``student``, which is frozen, whose quantizers are those of ``target`` and spelled by ``ops``.

    Raises:
        UnsupportedModel: if a layer cannot be written, or ``target`` cannot hold a grid; says which and what to do.
    """
    for name, reason in student.meta.get("untraced", {}).items():
        raise UnsupportedModel(
            f"{name} cannot be exported, because it could not be traced ({reason}): rewrite its forward without "
            "decisions on values, and quantize again"
        )
    graph = copy.deepcopy(student).cpu().eval().requires_grad_(False)
    for node in list(graph.graph.nodes):
        identity = preserves_value(node) and node.op != "call_method"  # a method may be there for the layout in memory
        if identity or (isinstance(act := module_of(node), ActivationQuantizer) and not act.ready):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.graph.erase_node(node)
    _separate_calls(graph)
    weights = {node: _integers(node, target) for node in layers(graph) if weight_quantizer(_layer(node)) is not None}
    _fold_norms(graph, weights)
    _share_over_concatenations(graph)
    _repeat_after_moves(graph)
    for node in [node for node in graph.graph.nodes if isinstance(module_of(node), ActivationQuantizer)]:
        graph.set_submodule(str(node.target), _activation(graph, node, target, ops))
    for node, weight in weights.items():
        layer = _layer(node)
        # Not by torch's own removal, which takes the quantizer out of the class, and so out of the student too.
        layer.__class__ = type(layer).__bases__[0]
        del layer.parametrizations
        layer.register_parameter("weight", nn.Parameter(torch.empty(0), requires_grad=False))
        codes = IntegerWeight(weight.codes.to(torch.int8), weight.scale.float(), weight.axis, ops)
        parametrize.register_parametrization(layer, "weight", codes, unsafe=True)
    for node, weight in weights.items():
        _install_bias(node, weight, target, ops)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def integer_weight(module: nn.Module | None) -> IntegerWeight | None:
    """The integers behind the weight of a layer of a lowered graph, if it has any."""
    if module is None or not parametrize.is_parametrized(module, "weight"):
        return None
    found = module.parametrizations.weight[0]  # type: ignore[union-attr, index]  # a ModuleDict that is read by name
    return found if isinstance(found, IntegerWeight) else None


def why_float(node: fx.Node, target: Target) -> str | None:
    """Why the layer or product ``node`` of a lowered graph computes in float on ``target``; None if it does not."""
    module = module_of(node)
    if isinstance(module, _ConvTransposeNd):
        return "there is no integer kernel for transposed convolutions"
    if module is not None and integer_weight(module) is None:
        return "its weight is float"
    floats = [each for each in node.all_input_nodes if not isinstance(module_of(each), IntegerActivation)]
    if floats:
        return f"it reads {_label(floats[0])} in float"
    if isinstance(module, _ConvNd) and target.quantized_outputs:
        floats = [user for user in consumers(node) if not isinstance(module_of(user), IntegerActivation)]
        if floats:
            return f"{_label(floats[0])} reads it in float"
    return None


@dataclass
class _Weight:
    """``codes * scale`` with ``scale`` (C,) along ``axis``, and the bias (C,) beside it."""

    codes: Tensor
    scale: Tensor
    axis: int
    bias: Tensor | None

    def along(self, values: Tensor) -> Tensor:
        """``values`` (C,), shaped to multiply the codes."""
        shape = [1] * self.codes.dim()
        shape[self.axis] = -1
        return values.reshape(shape)


def _integers(node: fx.Node, target: Target) -> _Weight:
    """The weight of a layer around zero point 0, as every integer kernel wants it."""
    layer = _layer(node)
    quantizer = weight_quantizer(layer)
    assert quantizer is not None
    assert quantizer.codes is not None
    axis = 1 if isinstance(layer, _ConvTransposeNd) else 0
    codes = quantizer.codes.double() + quantizer.low - quantizer.zero_point.double()
    channels, found = codes.shape[axis], quantizer.scale.detach().double()
    if found.numel() not in (1, channels) or found.numel() != (1 if found.numel() == 1 else found.shape[axis]):
        raise UnsupportedModel(
            f"{node.target} has {found.numel()} scales, which {target.name} cannot hold: one for the layer or one an "
            f"output channel; quantize with --protocol {target.protocol.name}"
        )
    if codes.min() < -128 or codes.max() > 127:
        raise UnsupportedModel(
            f"the {quantizer.bits}-bit weights of {node.target} are asymmetric, and {target.name} cannot hold them: "
            f"quantize with --protocol {target.protocol.name}"
        )
    bias = layer.bias
    return _Weight(codes, found.reshape(-1).expand(channels), axis, None if bias is None else bias.detach().double())


def _activation(graph: fx.GraphModule, node: fx.Node, target: Target, ops: Dialect) -> IntegerActivation:
    """The grid of a quantizer in the type of ``target``; takes the place of a clip before it."""
    act = module_of(node)
    assert isinstance(act, ActivationQuantizer)
    low, high, zero = act.low, act.high, int(act.zero_point)
    dtype = torch.int8 if target.activations == "int8" else torch.uint8
    whole = torch.iinfo(dtype)
    shift = low if target.activations == "uint8" else 0
    floor, ceiling = (low, high) if not node.meta.get("repeats") else (whole.min + shift, whole.max + shift)
    fits = whole.min <= low - shift <= high - shift <= whole.max and low <= zero <= high
    if not fits or (target.activations == "int8" and zero != 0):
        raise UnsupportedModel(
            f"the {act.bits}-bit activations of {_label(node.all_input_nodes[0])} are "
            f"{low} .. {high} around {zero}, and {target.name} holds {target.activations} "
            f"{'around 0' if target.activations == 'int8' else 'around a value among them'}: "
            f"quantize with --protocol {target.protocol.name}"
        )
    narrow = (low - shift, high - shift) != (whole.min, whole.max)
    if narrow and not target.narrow_activations:
        raise UnsupportedModel(
            f"{target.name} cannot hold the {act.bits}-bit activations of {_label(node.all_input_nodes[0])}: "
            f"quantize with 8-bit activations and --protocol {target.protocol.name}"
        )
    source = node.all_input_nodes[0]
    limits = clip_limits(source)
    if target.narrow_activations and limits and all(isinstance(module_of(u), _GRIDS) for u in source.users):
        with torch.no_grad():
            ends = [torch.tensor(end, dtype=torch.float32) / act.scale for end in limits]  # as a value is rounded
        floor, ceiling = max(floor, int(ends[0].round()) + zero), int(min(ends[1].round().item() + zero, ceiling))
        node.replace_input_with(source, source.all_input_nodes[0])
        if not source.users:
            graph.graph.erase_node(source)
    return IntegerActivation(act.scale, zero - shift, floor - shift, ceiling - shift, dtype, ops)


_GRIDS = (ActivationQuantizer, IntegerActivation)


def _separate_calls(graph: fx.GraphModule) -> None:
    """Give each call of a layer or quantizer a module of its own, in place: what is written depends on the place."""
    calls: Counter[str] = Counter()
    for node in graph.graph.nodes:
        module = module_of(node)
        if isinstance(module, ActivationQuantizer) or (module is not None and weight_quantizer(module) is not None):
            calls[str(node.target)] += 1
            if calls[str(node.target)] > 1:
                node.target = f"{node.target}_call{calls[str(node.target)]}"
                graph.add_submodule(node.target, copy.deepcopy(module))


def _fold_norms(graph: fx.GraphModule, weights: dict[fx.Node, _Weight]) -> None:
    """Fold, in place, each BatchNorm that alone reads a quantized layer into its scales and bias; codes stay."""
    for node in list(graph.graph.nodes):
        bn = module_of(node)
        if not isinstance(bn, _BatchNorm) or bn.running_mean is None or bn.running_var is None:
            continue
        source = producer(node)
        weight = weights.get(source)
        plain = type(bn).forward.__module__.startswith("torch.nn.modules.")
        channels_last = isinstance(module_of(source), nn.Linear) and len(source.meta["shape"]) != 2
        if weight is None or weight.axis != 0 or len(source.users) != 1 or not plain or channels_last:
            continue
        gamma = torch.ones_like(bn.running_mean) if bn.weight is None else bn.weight.detach()
        factor = gamma.double() / (bn.running_var.double() + bn.eps).sqrt()
        codes = weight.codes * weight.along(factor.sign())
        if codes.max() > 127:  # a negative factor met -128
            continue
        beta = 0.0 if bn.bias is None else bn.bias.detach().double()
        before = 0.0 if weight.bias is None else weight.bias
        weight.bias = (before - bn.running_mean.double()) * factor + beta
        weight.codes, weight.scale = codes, torch.where(factor == 0, weight.scale, weight.scale * factor.abs())
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)


def _share_over_concatenations(graph: fx.GraphModule) -> None:
    """Quantize the parts of a concatenation on the grid of the whole, in place: rounding acts on each number alone."""
    for node in reversed(graph.graph.nodes):
        readers = list(node.users)
        if node.target not in _CONCATENATIONS or not readers:
            continue
        if len(readers) == 1 and isinstance(module_of(readers[0]), ActivationQuantizer):
            parts = [part for part in node.all_input_nodes if _grid(part) is None]
            whole = len(parts) == len(node.all_input_nodes)  # otherwise one is on a grid of its own, for other readers
            for part in parts:
                _requantize(graph, part, readers[0], [node])
            readers[0].meta["repeats"] = whole


def _repeat_after_moves(graph: fx.GraphModule) -> None:
    """Say again, in place, on which grid the output of a pool or a view lies, where anything computes with it."""
    for node in list(graph.graph.nodes):
        grid = _grid(node)
        if grid is None or grid is node or "shape" not in node.meta:
            continue
        readers = [user for user in node.users if user.op != "output" and not isinstance(module_of(user), _GRIDS)]
        if readers:
            _requantize(graph, node, grid, readers).meta["repeats"] = True


def _grid(node: fx.Node) -> fx.Node | None:
    """The quantizer on whose grid the value of ``node`` lies."""
    while not isinstance(module_of(node), ActivationQuantizer):
        if not moves_values(node) or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return node


def _requantize(graph: fx.GraphModule, value: fx.Node, grid: fx.Node, readers: list[fx.Node]) -> fx.Node:
    """Let ``readers`` read ``value`` through a quantizer like ``grid``."""
    name = f"{grid.target}_{value.name}"
    graph.add_submodule(name, copy.deepcopy(module_of(grid)))  # type: ignore[arg-type]  # a quantizer
    with graph.graph.inserting_after(value):
        node = graph.graph.call_module(name, (value,))
    node.meta.update(grid.meta, shape=value.meta["shape"], repeats=False)
    for reader in readers:
        reader.replace_input_with(value, node)
    return node


def _install_bias(node: fx.Node, weight: _Weight, target: Target, ops: Dialect) -> None:
    """Set the bias of a layer, in int32 where an integer kernel adds it, in place."""
    layer = _layer(node)
    if weight.bias is None:
        return
    if layer.bias is None:
        layer.bias = nn.Parameter(weight.bias.float(), requires_grad=False)
    layer.bias.data.copy_(weight.bias)
    added_outside = isinstance(layer, nn.Linear) and len(node.all_input_nodes[0].meta["shape"]) != 2
    if not target.integer_bias or added_outside or why_float(node, target) is not None:
        return
    act, kept = module_of(node.all_input_nodes[0]), integer_weight(layer)
    assert isinstance(act, IntegerActivation)
    assert kept is not None
    # The bias can only be a multiple of both scales, which is coarse where both are of few bits: 1.5 points of a
    # W4A4 ResNet-20. The same weights in larger integers at a smaller scale make it finer.
    factor = _widening(kept.codes, act)
    fine = kept.scale / factor
    # A dead channel has next to no scale, and its bias would not fit: a coarser one, which its zeros do not notice.
    least = (weight.bias.abs() / (_INT32 - 1) / act.scale.double()).float() * (1 + 1e-6)
    kept.scale = torch.maximum(fine, least)
    codes = (kept.codes * weight.along(fine.double() / kept.scale.double())).round() * factor
    kept.codes = codes.to(torch.int8)
    scale = act.scale * kept.scale  # in float32, as runtimes compute it
    codes = (weight.bias / scale.double()).round().clamp(-_INT32, _INT32).to(torch.int32)
    parametrize.register_parametrization(layer, "bias", IntegerBias(codes, scale, 0, ops), unsafe=True)


def _widening(codes: Tensor, act: IntegerActivation) -> int:
    """The largest power of two by which weight ``codes`` can be multiplied in any kernel for int8.

    On CPUs without VNNI two products are added in int16, which must not saturate.
    """
    reach = max(int(codes.max()), -int(codes.min()), 1)
    inputs = max(abs(limit) for limit in act.limits)
    factor = 1
    while int(codes.max()) * factor * 2 <= 127 and reach * factor * 2 <= 128 and reach * factor * 4 * inputs <= 2**15:
        factor *= 2
    return factor


def _layer(node: fx.Node) -> nn.Conv2d | nn.Linear:
    module = module_of(node)
    assert isinstance(module, _ConvNd | nn.Linear)
    return module  # type: ignore[return-value]  # any of the layers; mypy needs one that has weight and bias


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name
