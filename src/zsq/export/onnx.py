"""A student as ONNX: opset 21, integer initializers between QuantizeLinear and DequantizeLinear, any batch size.

Two idioms let CPUs run low-bit files at the speed of 8 bits: weights of up to 4 bits are INT4 initializers that a Cast
widens to INT8, and activations of fewer bits are clipped as integers. Runtimes fold the first and fuse past the second;
they fold the scales of biases too, which such a file has as products of the two scales behind a layer.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from zsq.core import MissingExtra, UnsupportedModel
from zsq.export.lower import IntegerActivation
from zsq.export.targets import Target
from zsq.export.tracing import exported, place_of_operator, quiet

__all__ = ["Onnx", "onnx_bytes"]

_OPSET = 21
"""The first with INT4 (IR version 10)."""


class Onnx:
    """The conversions as ONNX operators, while ``torch.onnx`` exports."""

    def convert(self, x: Tensor, grid: IntegerActivation) -> Tensor:
        """QuantizeLinear, Clip where the grid is narrower than its type, DequantizeLinear."""
        parameters = [grid.scale, grid.zero_point]
        q = _op("QuantizeLinear", [x, *parameters], grid.zero_point.dtype, x.shape)
        if grid.clips:
            q = _op("Clip", [q, grid.low, grid.high], q.dtype, x.shape)
        return _op("DequantizeLinear", [q, *parameters], torch.float32, x.shape)

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
        """DequantizeLinear along ``axis``."""
        inputs = [codes, scale] if codes.dtype == torch.int32 else [codes, scale, zero_point]  # that of a bias is 0
        return _op("DequantizeLinear", inputs, torch.float32, codes.shape, axis=axis)


def _op(name: str, inputs: list[Tensor], dtype: torch.dtype, shape: Any, **attributes: int) -> Tensor:
    return torch.onnx.ops.symbolic(name, inputs, dict(attributes), dtype=dtype, shape=shape, version=_OPSET)


def onnx_bytes(
    graph: fx.GraphModule, input_shape: tuple[int, int, int], target: Target, metadata: Mapping[str, str]
) -> bytes:
    """The file of a lowered ``graph``: ``images`` (N, C, H, W), normalised, to ``logits`` (N, K).

    Raises:
        MissingExtra: if the packages of the extra ``onnx`` are not installed.
        UnsupportedModel: if an operation has no ONNX form.
    """
    try:
        import onnx_ir as ir
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        raise MissingExtra(f"{error.name} is not installed: pip install 'zsq[onnx]'") from error
    traced = exported(graph, input_shape)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: "N"},)}
    try:
        with quiet():
            program = torch.onnx.export(traced, dynamo=True, opset_version=_OPSET, verbose=False, **names)
    except torch.onnx.errors.OnnxExporterError as error:
        missing = re.search(r"No ONNX function found for <OpOverload\(op='\w+\.(\w+)'", str(error))
        if missing is None:
            raise UnsupportedModel(f"torch.onnx fails on this network: {error.__cause__ or error}") from error
        place = place_of_operator(graph, missing[1], input_shape)
        raise UnsupportedModel(f"{place} has no ONNX form: put other operations in its place") from error
    assert program is not None
    model = program.model
    _transpose_at_rest(model)
    _pool_globally(model)
    _name_layers(model)
    if target.int4:
        _store_in_4_bits(model)
        _multiply_bias_scales(model)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    _forget_sources(model)
    model.opset_imports.clear()
    model.opset_imports[""] = _OPSET
    model.metadata_props.update(metadata)
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]  # a tenth of a small file, and every runtime finds the shapes itself
    content: bytes = proto.SerializeToString()
    return content


def narrowed(codes: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], int] | None:
    """``codes`` as 4-bit integers times a power of two, if they are that."""
    bits = int(np.bitwise_or.reduce(codes.astype(np.uint8), axis=None))
    factor = bits & -bits or 1  # the lowest bit that any of them has
    narrow = codes // factor
    return (narrow, factor) if narrow.min() >= -8 and narrow.max() <= 7 else None


def _store_in_4_bits(model: Any) -> None:
    """Let INT8 weights that fit be INT4 initializers, which constant operators widen, in place."""
    import ml_dtypes
    import onnx_ir as ir

    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        codes = node.inputs[0]
        if codes.const_value is None or codes.dtype != ir.DataType.INT8:
            continue
        found = narrowed(codes.const_value.numpy())
        if found is None:
            continue
        readers = list(codes.uses())
        codes.const_value = ir.tensor(found[0].astype(ml_dtypes.int4), ir.DataType.INT4, name=codes.name)
        codes.dtype = ir.DataType.INT4
        wide, name = codes, codes.name
        if found[1] > 1:
            factor = ir.Value(name=f"{name}_factor", const_value=ir.tensor(found[1], ir.DataType.INT32))
            model.graph.register_initializer(factor)
            wide = _insert(model, node, "Cast", [wide], f"{name}_int32", ir.DataType.INT32)
            wide = _insert(model, node, "Mul", [wide, factor], f"{name}_wide", ir.DataType.INT32)
        wide = _insert(model, node, "Cast", [wide], f"{name}_int8", ir.DataType.INT8)
        for reader, index in readers:
            reader.replace_input_with(index, wide)


def _multiply_bias_scales(model: Any) -> None:
    """Let scales of biases be products of constants, which they are, in place: half of what a file with 4 bits adds."""
    import onnx_ir as ir

    for node in [node for node in model.graph if len(node.inputs) > 2 and node.inputs[2] is not None]:
        read, weight, bias = (value.producer() for value in node.inputs[:3])
        if any(each is None or each.op_type != "DequantizeLinear" for each in (read, weight, bias)):
            continue
        act, scale, held = (each.inputs[1] for each in (read, weight, bias))
        if any(each.const_value is None for each in (act, scale, held)):
            continue
        if np.array_equal(act.const_value.numpy() * scale.const_value.numpy(), held.const_value.numpy()):
            product = _insert(model, bias, "Mul", [scale, act], f"{held.name}_product", ir.DataType.FLOAT)
            bias.replace_input_with(1, product)


def _insert(model: Any, before: Any, name: str, inputs: list[Any], output: str, dtype: Any) -> Any:
    """The output of a new node whose result looks like its first input, of another type."""
    import onnx_ir as ir

    node = ir.node(name, inputs, {"to": dtype} if name == "Cast" else {}, name=output)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = output, dtype, inputs[0].shape
    model.graph.insert_before(before, node)
    return node.outputs[0]


def _transpose_at_rest(model: Any) -> None:
    """Store the weights of matrix products as they are multiplied, in place: a Transpose between hides them."""
    import onnx_ir as ir

    for node in [node for node in model.graph if node.op_type == "Transpose"]:
        dequantize = node.inputs[0].producer()
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or len(node.inputs[0].uses()) != 1:
            continue
        codes = dequantize.inputs[0]
        if codes.const_value is None or len(codes.uses()) != 1 or list(node.attributes["perm"].as_ints()) != [1, 0]:
            continue
        codes.const_value = ir.tensor(codes.const_value.numpy().T.copy(), codes.dtype, name=codes.name)
        codes.shape = codes.const_value.shape
        dequantize.attributes["axis"] = ir.AttrInt64("axis", 1 - dequantize.attributes["axis"].as_int())
        dequantize.outputs[0].shape = codes.shape
        node.outputs[0].replace_all_uses_with(dequantize.outputs[0])
        model.graph.remove(node, safe=True)


def _pool_globally(model: Any) -> None:
    """Let means over all pixels be GlobalAveragePool, which has an integer kernel, in place."""
    import onnx_ir as ir

    for node in [node for node in model.graph if node.op_type == "ReduceMean"]:
        shape, axes = node.inputs[0].shape, node.inputs[1].const_value
        if shape is None or len(shape) != 4 or axes is None or not node.attributes["keepdims"].as_int():
            continue
        if sorted(int(axis) % 4 for axis in axes.numpy()) == [2, 3]:
            pool = ir.node("GlobalAveragePool", [node.inputs[0]], name=node.name)
            pool.outputs[0].dtype, pool.outputs[0].shape = node.outputs[0].dtype, node.outputs[0].shape
            model.graph.insert_before(node, pool)
            node.outputs[0].replace_all_uses_with(pool.outputs[0])
            model.graph.remove(node, safe=True)


def _name_layers(model: Any) -> None:
    """Name layers as in the network, and their tensors by them: ``conv1.weight``, ``conv1.weight_scale``, in place."""
    for value in list(model.graph.initializers.values()):
        layer, found, rest = value.name.partition(".parametrizations.")
        if found:
            tensor, _, part = rest.split(".")
            value.name = f"{layer}.{tensor}" + ("" if part == "codes" else f"_{part}")
            if (tensor, part) == ("weight", "codes"):
                for dequantize, _ in value.uses():
                    for reader, _ in dequantize.outputs[0].uses():
                        reader.name = layer


def _forget_sources(model: Any) -> None:
    """Drop, in place, what torch notes on each node: paths and code of the machine that exports."""
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
