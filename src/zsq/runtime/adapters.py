"""Synthesized images for other quantizers: as ONNX Runtime, as NNCF and as a plain loop want them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from zsq.core import DataError, MissingExtra, RecipeError

if TYPE_CHECKING:
    import nncf

    from zsq.api import Result

    Array = np.ndarray[Any, np.dtype[np.float32]]

__all__ = ["CalibrationReader", "batches", "images_of", "nncf_dataset"]


def images_of(source: "Result | str | Path") -> "Array":
    """The images (N, C, H, W) that a ``Result``, a run folder or an ``.npz`` of ``zsq synthesize`` holds, normalised.

    An ``.npz`` holds what a screen can show: pixels rounded to uint8, and clipped.

    Raises:
        DataError: if there are none, because the method makes none or the file is of another kind.
    """
    if not isinstance(source, str | Path):
        if source.images is None:
            raise DataError(f"{source.recipe.name} made no images: choose a method that synthesizes, such as zeroq")
        return np.ascontiguousarray(source.images.images.cpu().numpy(), dtype=np.float32)
    path = Path(source)
    if path.suffix == ".npz":
        return _normalised(path)
    try:
        return np.asarray(load_file(path / "images.safetensors")["images"], dtype=np.float32)
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(
            f"{path} holds no images ({error}): give the folder of a run whose method synthesizes, or an .npz that "
            "zsq synthesize made"
        ) from error


def batches(source: "Result | str | Path | Array", batch_size: int = 32) -> Iterator["Array"]:
    """The images of ``source`` (n, C, H, W) in order, ``batch_size`` at a time; the last batch may be smaller.

    Raises:
        DataError: if there are no images.
    """
    images = source if isinstance(source, np.ndarray) else images_of(source)
    _check_batch_size(batch_size)
    return (images[start : start + batch_size] for start in range(0, len(images), batch_size))


class CalibrationReader:
    """The images of ``source`` as ``onnxruntime.quantization.quantize_static`` reads them: a ``CalibrationDataReader``.

    ONNX Runtime takes any class with such a ``get_next`` for one, so none of it is imported here.
    """

    def __init__(self, source: "Result | str | Path | Array", input_name: str = "images", batch_size: int = 32) -> None:
        """``input_name`` is that of the float file.

        Raises:
            DataError: if there are no images.
        """
        self._batches = list(batches(source, batch_size))
        self._input_name = input_name
        self.rewind()

    def rewind(self) -> None:
        """Start again at the first image."""
        self._next = 0

    def get_next(self) -> "dict[str, Array] | None":
        """The next batch (n, C, H, W) by the name of the input; None at the end."""
        if self._next == len(self):
            return None
        self._next += 1
        return {self._input_name: self._batches[self._next - 1]}

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> "Iterator[dict[str, Array]]":
        return iter(self.get_next, None)


def nncf_dataset(source: "Result | str | Path | Array", batch_size: int = 1) -> "nncf.Dataset":
    """The images of ``source`` as an ``nncf.Dataset``; ``nncf.quantize`` counts its ``subset_size`` in batches.

    Raises:
        MissingExtra: if NNCF is not installed.
        DataError: if there are no images.
    """
    try:
        import nncf
    except ImportError as error:
        raise MissingExtra("nncf is not installed: pip install nncf") from error
    return nncf.Dataset(list(batches(source, batch_size)))


def _normalised(path: Path) -> "Array":
    try:
        with np.load(path, allow_pickle=False) as file:
            pixels, mean, std = (np.asarray(file[key]) for key in ("x", "mean", "std"))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read ({error}): make it with zsq synthesize --out {path.name}") from error
    if pixels.ndim != 4 or pixels.dtype != np.uint8 or not mean.shape == std.shape == pixels.shape[3:]:
        raise DataError(
            f"x in {path} is {pixels.dtype} {pixels.shape}, with mean {mean.shape}: no images of zsq synthesize"
        )
    images = (pixels.astype(np.float32) / 255 - mean.astype(np.float32)) / std.astype(np.float32)  # (N, H, W, C)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise RecipeError(f"batch_size must be at least 1, got {batch_size}")
