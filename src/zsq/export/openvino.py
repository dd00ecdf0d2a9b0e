"""A student as OpenVINO IR: an ``.xml`` with the graph and a ``.bin`` with the integers of its ONNX file."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from zsq.core import MissingExtra

__all__ = ["openvino_bytes"]


def openvino_bytes(onnx: bytes, about: Mapping[str, str]) -> tuple[bytes, bytes]:
    """The ``.xml`` and the ``.bin`` for the content of an ONNX file; ``about`` is the runtime information ``zsq``.

    Raises:
        MissingExtra: if OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtra(f"{error.name} is not installed: pip install 'zsq[openvino]'") from error
    model = openvino.Core().read_model(onnx)
    model.set_rt_info(json.dumps(dict(about)), "zsq")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()
