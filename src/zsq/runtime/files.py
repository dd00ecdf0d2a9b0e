"""Exported files as this package reads them: ONNX (``.onnx``), and OpenVINO's pair of ``.xml`` and ``.bin``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from zsq.core import CheckpointError, MissingExtra
from zsq.runtime.sessions import installed, require

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["about", "image_shape", "read_onnx", "runtimes_of", "size_of"]

_RUNTIMES = {".onnx": ("onnxruntime", "openvino"), ".xml": ("openvino",)}
_EXTRAS = {".onnx": "ort", ".xml": "openvino"}


def runtimes_of(file: str | Path) -> list[str]:
    """The installed runtimes that read ``file``.

    Raises:
        CheckpointError: if it is missing, or no file that a runtime reads.
        MissingExtra: if none is installed.
    """
    path = Path(file)
    if path.suffix not in _RUNTIMES:
        raise CheckpointError(f"{file} is none of {', '.join(_RUNTIMES)}: no runtime here reads it")
    if not path.is_file():
        raise CheckpointError(f"no file {file}: zsq export makes one")
    found = [runtime for runtime in _RUNTIMES[path.suffix] if installed(runtime)]
    if not found:
        raise MissingExtra(f"no runtime for {path.suffix} is installed: pip install 'zsq[{_EXTRAS[path.suffix]}]'")
    return found


def read_onnx(file: str | Path) -> "ModelProto":
    """The ONNX model in ``file``.

    Raises:
        CheckpointError: if it is missing, incomplete, or no ONNX file.
        MissingExtra: if onnx is not installed.
    """
    require("onnx")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(Path(file).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}): zsq export makes one") from error
    except DecodeError as error:
        raise CheckpointError(f"{file} is no complete ONNX file: it is cut short, or of another kind") from error
    if not model.graph.node or not model.opset_import:
        raise CheckpointError(f"{file} is no complete ONNX file: it has no graph, or no operator set")
    return model


def about(file: str | Path) -> dict[str, str]:
    """What an exported file says of itself, such as ``method`` and ``bits``; nothing if it is not from zsq.

    Raises:
        CheckpointError: if it is missing, incomplete or of another kind.
    """
    if Path(file).suffix == ".xml":
        entries = _runtime_information(file)
    else:
        entries = {each.key: each.value for each in read_onnx(file).metadata_props}
    return {key.removeprefix("zsq."): value for key, value in entries.items() if key.startswith("zsq.")}


def _runtime_information(file: str | Path) -> dict[str, str]:
    try:
        entry = ElementTree.parse(file).find("rt_info/zsq")
        return {} if entry is None else dict(json.loads(entry.get("value", "{}")))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}): zsq export makes one") from error
    except (ElementTree.ParseError, ValueError) as error:
        raise CheckpointError(f"{file} is no complete file of OpenVINO: it is cut short, or of another kind") from error


def image_shape(model: "ModelProto") -> tuple[int, int, int]:
    """The shape (C, H, W) of the images that ``model`` takes.

    Raises:
        CheckpointError: if its first input is not of images (N, C, H, W) with fixed C, H and W.
    """
    entry = model.graph.input[0].type.tensor_type.shape.dim if model.graph.input else []
    sizes = [each.dim_value for each in entry][1:]
    if len(sizes) != 3 or min(sizes) < 1:
        raise CheckpointError(
            f"the file takes {[each.dim_param or each.dim_value for each in entry]}, not images (N, C, H, W)"
        )
    return sizes[0], sizes[1], sizes[2]


def size_of(file: str | Path) -> int:
    """The bytes of ``file`` on disk, with the weights that lie beside an ``.xml``."""
    path = Path(file)
    return path.stat().st_size + (path.with_suffix(".bin").stat().st_size if path.suffix == ".xml" else 0)
