"""A run with the file that was exported from it, and ways to spoil that file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from zsq.api import Result


@dataclass(frozen=True)
class Exported:
    run: Path
    file: Path
    result: Result
    float_file: Path

    def changed(self, change: Callable[[onnx.ModelProto], None], into: Path) -> Path:
        return changed(self.file, change, into)


def changed(file: Path, change: Callable[[onnx.ModelProto], None], into: Path) -> Path:
    """The path of a copy of ``file`` in the folder ``into`` on which ``change`` has worked."""
    model = onnx.load(file)
    change(model)
    onnx.save(model, into / "changed.onnx")
    return into / "changed.onnx"


def node_called(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def made_by(model: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if tensor in node.output)


def constant(model: onnx.ModelProto, name: str) -> np.ndarray[Any, Any]:
    return numpy_helper.to_array(next(each for each in model.graph.initializer if each.name == name))


def replace_input(model: onnx.ModelProto, node: onnx.NodeProto, index: int, value: np.ndarray[Any, Any]) -> None:
    """Let ``node`` read a constant of its own: constants are shared."""
    name = f"{node.name}_{node.output[0]}_{index}"
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    node.input[index] = name


def double_bias_scale(layer: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        dequantize = made_by(model, node_called(model, layer).input[2])
        scales = [constant(model, name) for name in made_by(model, dequantize.input[1]).input]
        replace_input(model, dequantize, 1, 2 * scales[0] * scales[1])

    return change


def clip_in_float(layer: str) -> Callable[[onnx.ModelProto], None]:
    """Clip the output of ``layer`` to the range of its quantizer before that, as papers do."""

    def change(model: onnx.ModelProto) -> None:
        node = node_called(model, layer)
        quantize = next(each for each in model.graph.node if node.output[0] in each.input)
        scale = constant(model, quantize.input[1])
        ends = {"lowest": np.float32(0), "highest": np.float32(7 * scale)}
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(end), name) for name, end in ends.items())
        clip = helper.make_node("Clip", [node.output[0], *ends], ["clipped"], name="clip")
        model.graph.node.insert(list(model.graph.node).index(quantize), clip)
        quantize.input[0] = "clipped"

    return change


def read_float(layer: str) -> Callable[[onnx.ModelProto], None]:
    """Let ``layer`` read what its input was before it was quantized."""

    def change(model: onnx.ModelProto) -> None:
        node = node_called(model, layer)
        while (before := made_by(model, node.input[0])).op_type in ("DequantizeLinear", "Clip", "QuantizeLinear"):
            node.input[0] = before.input[0]

    return change


def sign_activations(model: onnx.ModelProto) -> None:
    """Move every activation from uint8 to int8, values unchanged."""
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            replace_input(model, node, 2, (constant(model, node.input[2]).astype(int) - 128).astype(np.int8))
            for reader in [each for each in model.graph.node if node.output[0] in each.input]:
                ends = [1, 2] if reader.op_type == "Clip" else [2]
                for index in ends:
                    shifted = constant(model, reader.input[index]).astype(int) - 128
                    replace_input(model, reader, index, shifted.astype(np.int8))
                for dequantize in [each for each in model.graph.node if reader.output[0] in each.input]:
                    if reader.op_type == "Clip":
                        dequantize.input[2] = node.input[2]
