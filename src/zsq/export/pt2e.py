"""A student as an exported torch program (``.pt2``): the operators that Inductor's int8 passes look for on x86.

These are the operators that ``convert_pt2e`` of torchao leaves behind, with the student's own scales in them: no
observer looks at anything again. To run it in integers, with torchao's passes and torch's freezing:

    import torch, torch._inductor.config, torchao.quantization.pt2e.quantize_pt2e
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86
    torch._inductor.config.freezing = True
    program = torch.export.load("pt2e-x86.pt2").module()
    compiled = torch.compile(lower_pt2e_quantized_to_x86(program, (images,)))
"""

import importlib
import io
import json
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from zsq.export.lower import IntegerActivation
from zsq.export.tracing import exported

__all__ = ["Decomposed", "pt2_bytes"]


class Decomposed:
    """The conversions as torch's ``quantized_decomposed`` operators."""

    def __init__(self) -> None:
        importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers them
        self.ops = torch.ops.quantized_decomposed

    def convert(self, x: Tensor, grid: IntegerActivation) -> Tensor:
        """quantize_per_tensor and dequantize_per_tensor, after a clip where the grid is narrower than its type."""
        whole = torch.iinfo(grid.zero_point.dtype)
        zero_point, low, high = grid.limits
        step = grid.step, zero_point, whole.min, whole.max, grid.zero_point.dtype
        if grid.clips:  # in float, as fused kernels do it: they do not look at the limits that quantizing has
            x = F.hardtanh(x, (low - zero_point) * grid.step, (high - zero_point) * grid.step)
        restored: Tensor = self.ops.dequantize_per_tensor(self.ops.quantize_per_tensor(x, *step), *step)
        return restored

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
        """dequantize_per_channel."""
        whole = torch.iinfo(codes.dtype)
        steps = scale, zero_point.long(), axis, whole.min, whole.max, codes.dtype
        restored: Tensor = self.ops.dequantize_per_channel(codes, *steps)
        return restored


def pt2_bytes(graph: fx.GraphModule, input_shape: tuple[int, int, int], about: Mapping[str, str]) -> bytes:
    """The file of a ``graph`` that was lowered to ``Decomposed``; ``about`` is its extra file ``zsq.json``."""
    buffer = io.BytesIO()
    torch.export.save(exported(graph, input_shape), buffer, extra_files={"zsq.json": json.dumps(dict(about), indent=1)})
    return buffer.getvalue()
