"""A student as ONNX: opset 21, integer initializers between QuantizeLinear and DequantizeLinear, any batch size.

Two idioms let CPUs run low-bit files at the speed of 8 bits: weights of up to 4 bits are INT4 initializers that a Cast
widens to INT8, and activations of fewer bits are clipped as integers. Runtimes fold the first and fuse past the second.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from zsq.core import MissingExtra
from zsq.export.lower import IntegerActivation
from zsq.export.targets import Target

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
        return _op("DequantizeLinear", [codes, scale, zero_point], torch.float32, codes.shape, axis=axis)


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
    with _quiet():
        program = torch.onnx.export(
            graph,
            (torch.zeros(2, *input_shape),),
            dynamo=True,
            opset_version=_OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
            verbose=False,
        )
    assert program is not None
    model = program.model
    _transpose_at_rest(model)
    _name_layers(model)
    if target.int4:
        _store_in_4_bits(model)
    _forget_sources(model)
    model.opset_imports.clear()
    model.opset_imports[""] = _OPSET
    model.metadata_props.update(metadata)
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def _store_in_4_bits(model: Any) -> None:
    """Let INT8 weights that fit be INT4 initializers, which a Cast widens, in place."""
    import ml_dtypes
    import onnx_ir as ir

    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        codes = node.inputs[0]
        if codes.const_value is None or codes.dtype != ir.DataType.INT8:
            continue
        values = codes.const_value.numpy()
        if not -8 <= values.min() <= values.max() <= 7:
            continue
        codes.const_value = ir.tensor(values.astype(ml_dtypes.int4), ir.DataType.INT4, name=codes.name)
        codes.dtype = ir.DataType.INT4
        readers = list(codes.uses())
        cast = ir.node("Cast", [codes], {"to": ir.DataType.INT8}, name=f"{codes.name}_cast")
        cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = (
            f"{codes.name}_int8",
            ir.DataType.INT8,
            codes.shape,
        )
        model.graph.insert_before(node, cast)
        for reader, index in readers:
            reader.replace_input_with(index, cast.outputs[0])


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of itself while it exports: none of it concerns the network."""
    with warnings.catch_warnings():
        # torch copies a deprecated class of its own.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        yield
