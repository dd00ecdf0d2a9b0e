"""How a network becomes a graph: ``torch.fx`` tracing that keeps torch's layers whole and knows what it cannot read.

``zsq.nets.graph.capture`` is the way in; what is here is its machinery.
"""

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from zsq.core.attention import attend
from zsq.nets.clip import ChannelClip

__all__ = ["LAYERS", "LAYER_FUNCTIONS", "Layer", "LayerTracer", "Untraceable", "asks_size", "is_layer", "prepare"]

Layer: TypeAlias = _ConvNd | nn.Linear
LAYERS = (_ConvNd, nn.Linear)
"""Modules with a weight to quantize; transposed convolutions are ``_ConvNd`` too."""

LAYER_FUNCTIONS = frozenset(
    {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
)
"""The same as functions of an input and a weight."""

_COMPOSITES = (
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.MultiheadAttention, nn.Transformer),
    *(nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer),
)
# What a tensor tells without its values being looked at: attributes, and methods.
_FACTS = frozenset({"shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_nested", "is_sparse", "requires_grad"})
_QUESTIONS = frozenset({"size", "dim", "ndimension", "numel", "stride", "is_floating_point", "is_contiguous"})


class Untraceable(Exception):
    """The module ``name`` ("" is the whole network) cannot be traced, for ``reason``."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's layers or a subclass of one, which the graph shows as one node."""
    classes = [base for base in type(module).__mro__ if base.__module__.startswith("torch.nn.modules.")]
    return bool(classes) and classes != [nn.Module] and not isinstance(module, _COMPOSITES)


def prepare(network: nn.Module) -> nn.Module:
    """Rewrites ``network`` in place, function unchanged, so that tracing meets plain layers and visible products.

    Goes by attribute and torch class, so that it holds for families of networks that this library does not know.
    """
    for module in list(network.modules()):
        if hasattr(module, "fused_attn"):  # timm's switch between one fused kernel and separate products
            module.fused_attn = False  # type: ignore[assignment]  # no Tensor
        if parametrize.is_parametrized(module):
            # Not by torch's own removal, which takes it out of the class, and so out of the original too.
            values = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore[union-attr]  # a dict
            module.__class__ = type(module).__bases__[0]
            del module.parametrizations
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))
        if isinstance(module, _BatchNorm) and _after_norm(module):
            # timm's BN with an activation inside: from here on a plain BN, after which the tracer calls the activation.
            module.__class__ = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules."))
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            out, width = module.in_proj_weight.shape
            module.in_proj = nn.Linear(width, out, bias=False, device="meta")
            module.in_proj.weight, module.in_proj.bias = module.in_proj_weight, module.in_proj_bias
    return network


def _after_norm(norm: nn.Module) -> list[nn.Module]:
    """What a normalisation layer with an activation inside applies after normalising, in order."""
    return [child for name in ("drop", "act") if isinstance(child := getattr(norm, name, None), nn.Module)]


def _self_attention(layer: nn.MultiheadAttention, x: Any, need_weights: bool, average: bool) -> tuple[Any, Any]:
    """``layer(x, x, x)`` as linears and products: (N, T, D), or (T, N, D) as the layer says, and its weights."""
    x = x if layer.batch_first else x.transpose(0, 1)
    project: Any = layer.in_proj  # put there by `prepare`
    qkv = project(x).unflatten(-1, (3, layer.num_heads, layer.head_dim)).permute(2, 0, 3, 1, 4)
    values, weights = attend(qkv[0], qkv[1], qkv[2])
    out = layer.out_proj(values.transpose(1, 2).flatten(2))
    out = out if layer.batch_first else out.transpose(0, 1)
    return out, (weights.mean(1) if average else weights) if need_weights else None


class _Value(fx.Proxy):
    """A traced value that may stand for a number where all images agree on it, such as a width."""

    tracer: "LayerTracer"

    def __getattr__(self, name: str) -> Any:
        if name in _FACTS:
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def __index__(self) -> int:
        return operator.index(self.tracer.known(self.node))

    def __int__(self) -> int:
        return int(self.tracer.known(self.node))

    def __float__(self) -> float:
        return float(self.tracer.known(self.node))

    def __len__(self) -> int:
        return self.tracer.length(self.node)

    def __setitem__(self, index: Any, value: Any) -> None:
        # From here on the variable that holds this proxy stands for the changed tensor.
        self.node = self.tracer.create_proxy("call_function", assigned, (self, index, value), {}).node


def assigned(x: Tensor, index: Any, value: Any) -> Tensor:
    """What ``x`` is after ``x[index] = value``, as a tensor of its own."""
    out = x.clone()
    out[index] = value
    return out


class LayerTracer(fx.Tracer):
    """Traces a prepared network of one argument; every other argument of its ``forward`` keeps its default.

    Conditions on sizes and types are decided by running ``batches``, two image batches of different size. A condition
    on values, or one that the batches decide differently, makes the innermost module that asks ``Untraceable``; it
    becomes a leaf when its dotted name is in ``untraced``. Nodes get ``meta["module_path"]``, the dotted path of the
    innermost module that is no leaf.
    """

    def __init__(self, batches: tuple[Tensor, Tensor], untraced: Mapping[str, str]) -> None:
        super().__init__()
        self.batches, self.untraced = batches, untraced
        self.failure: tuple[str, str] | None = None
        self._runs: list[dict[fx.Node, Any]] = []
        self._running = False

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of ``root``; raises ``Untraceable`` with the module to blame."""
        # Libraries tell torch.fx not to look into some functions, which may hold products and weights.
        opaque, kept = _symbolic_trace._wrapped_fns_to_patch, dict(_symbolic_trace._wrapped_fns_to_patch)
        opaque.clear()
        try:
            return super().trace(root, concrete_args)
        except Exception as error:
            raise Untraceable(*(self.failure or ("", _reason(error)))) from error
        finally:
            opaque.update(kept)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers, and what turned out to be untraceable."""
        return module_qualified_name in self.untraced or is_layer(m) or isinstance(m, ChannelClip)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Only the images vary."""
        images = self.create_proxy("placeholder", "images", (), {})
        self._runs = [{images.node: batch.clone()} for batch in self.batches]
        return root_fn, [self.root, images]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Remembers the innermost module that fails, and opens what ``prepare`` made ready to be opened."""
        if self._running:
            return forward(*args, **kwargs)
        if isinstance(m, nn.MultiheadAttention):
            forward = _opened(m, args, kwargs) or forward
        try:
            out = super().call_module(m, forward, args, kwargs)
            for child in _after_norm(m) if isinstance(m, _BatchNorm) else []:
                out = child(out)
            return out
        except Exception as error:
            if self.failure is None and any(m is known for known in self.root.modules()):
                name = self.path_of_module(m)
                self.failure = None if self.is_leaf_module(m, name) else (name, _reason(error))
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters are nodes, except while sizes are computed."""
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What the network's code gets to see of ``node``."""
        return _Value(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        """A node that knows its module."""
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        stack = ["", *(path for path, _ in self.module_stack.values())]
        node.meta["module_path"] = stack[-2] if kind == "call_module" and stack[-1] == target else stack[-1]
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """Takes fused attention apart, and calls the linears whose weights a function was given."""
        if target is F.scaled_dot_product_attention and not kwargs.get("enable_gqa"):
            return attend(*args, **{name: value for name, value in kwargs.items() if name != "enable_gqa"})[0]
        if target is F.multi_head_attention_forward:
            raise TraceError("attention with a mask, or with a key other than its query, is one piece in torch")
        if target is F.linear and (layer := self._layer_behind(*args, **kwargs)) is not None:
            return super().create_proxy("call_module", layer, args[:1] or (kwargs["input"],), {})
        return super().create_proxy(kind, target, args, kwargs, *rest, **more)

    def _layer_behind(self, input: Any, weight: Any, bias: Any = None) -> str | None:
        """The linear whose own ``weight`` and ``bias`` these are."""
        names = [
            str(p.node.target) if isinstance(p, fx.Proxy) and p.node.op == "get_attr" else "" for p in (weight, bias)
        ]
        owner = names[0].rpartition(".")[0]
        layer = self.root.get_submodule(owner)
        whole = names[0] == f"{owner}.weight" and names[1] == ("" if bias is None else f"{owner}.bias")
        return owner if type(layer) is nn.Linear and whole and (layer.bias is None) == (bias is None) else None

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The side that a condition takes."""
        return bool(self.known(obj.node))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of a value with a known number of parts."""
        parts: Any = obj
        return iter([parts[index] for index in range(self.length(obj.node))])

    def known(self, node: fx.Node) -> Any:
        """The value of ``node``, if it follows from sizes and types alone and is the same for both batches."""
        if not _factual(node):
            raise TraceError("control flow that depends on the values of a tensor")
        return self._agreed([self._run(node, run) for run in self._runs])

    def length(self, node: fx.Node) -> int:
        """The number of parts of ``node``, if it is the same for both batches."""
        return int(self._agreed([len(self._run(node, run)) for run in self._runs]))

    @staticmethod
    def _agreed(answers: list[Any]) -> Any:
        if answers[0] != answers[1]:
            raise TraceError("control flow that depends on the number of images")
        return answers[0]

    def _run(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """The value of ``node`` in one run, whose values so far are in ``known``."""
        wanted, todo = set(), [node]
        while todo:
            if (each := todo.pop()) not in known and each not in wanted:
                wanted.add(each)
                todo.extend(each.all_input_nodes)
        self._running = True  # fx has patched nn.Module: calls and parameters are to behave as outside of tracing
        try:
            with torch.no_grad():
                for each in (n for n in self.graph.nodes if n in wanted):
                    args = fx.node.map_arg(each.args, known.__getitem__)
                    kwargs = fx.node.map_arg(each.kwargs, known.__getitem__)
                    known[each] = perform(each, self.root, args, kwargs)
        finally:
            self._running = False
        return known[node]


def perform(node: fx.Node, root: nn.Module, args: Any, kwargs: Any) -> Any:
    """What ``node``, which names things in ``root``, makes of ``args`` and ``kwargs``."""
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]  # a function
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    found = operator.attrgetter(str(node.target))(root)
    return found(*args, **kwargs) if node.op == "call_module" else found


def asks_size(node: fx.Node) -> bool:
    """Whether ``node`` asks a tensor for its size, type or place, and does not read its values."""
    if node.op == "call_function":
        return node.target is getattr and node.args[1] in _FACTS
    return node.op == "call_method" and node.target in _QUESTIONS


def _factual(node: fx.Node) -> bool:
    """Whether the value of ``node`` follows from sizes and types alone."""
    computed = node.op in ("call_function", "call_method")
    return asks_size(node) or (computed and all(_factual(each) for each in node.all_input_nodes))


def _opened(layer: nn.MultiheadAttention, args: Any, kwargs: Any) -> Callable[..., Any] | None:
    """A ``forward`` that shows the products of ``layer``, if this is a call of plain, unmasked self-attention."""
    call = inspect.signature(nn.MultiheadAttention.forward).bind(layer, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    alone = given["query"] is given["key"] is given["value"]
    masked = given["attn_mask"] is not None or given["key_padding_mask"] is not None or given["is_causal"]
    if not alone or masked or layer.in_proj_weight is None or layer.bias_k is not None or layer.add_zero_attn:
        return None
    need, average = given["need_weights"], given["average_attn_weights"]
    return lambda *_, **__: _self_attention(layer, given["query"], need, average)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
