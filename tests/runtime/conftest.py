"""A tiny network, quantized and exported once."""

from pathlib import Path

import pytest
import tiny
from exported import Exported

from zsq.api import quantize
from zsq.nets.load import load_network
from zsq.runtime.floats import export_float

TINY = Path(tiny.__file__)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder, model = tmp_path_factory.mktemp("exported"), f"{TINY}:cnn"
    settings = tiny.settings("zeroq", samples=8)
    result = quantize(model, "zeroq", "w4a4", protocol="ort-x86", out=folder / "run", **settings)
    result.export(folder / "tiny.onnx")
    export_float(load_network(model, input_shape=tiny.SHAPE), folder / "float.onnx")
    return Exported(folder / "run", folder / "tiny.onnx", result, folder / "float.onnx")
