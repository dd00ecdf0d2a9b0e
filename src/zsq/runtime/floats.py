"""The float network as an ONNX file: what an integer file is measured against, and what other quantizers start from."""

import contextlib
import copy
import io
import warnings
from pathlib import Path

import torch

from zsq.core.run import save_atomically
from zsq.nets.load import Network
from zsq.runtime.sessions import require

__all__ = ["export_float"]


def export_float(network: Network, path: str | Path) -> None:
    """Write the float ``network`` as ONNX, opset 21: ``images`` (N, C, H, W), normalised, to ``logits`` (N, K).

    BatchNorm is folded into the layers before it, as every deployment does.

    Raises:
        MissingExtra: if onnx or onnxscript is not installed.
        RunError: if ``path`` cannot be written.
    """
    require("onnx", "onnxscript")
    module = copy.deepcopy(network.module).eval().requires_grad_(False)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of its own insides
        program = torch.onnx.export(
            module,
            (torch.zeros(2, *network.input_shape),),
            dynamo=True,
            opset_version=21,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    save_atomically(Path(path), program.model_proto.SerializeToString())
