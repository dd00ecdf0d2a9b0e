"""Accuracy on real images: the only module that opens a dataset, and it is never read by a method."""

import contextlib
import copy
import io
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from zsq.core.errors import DataError, MissingExtra

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Accuracy", "Images", "check_images", "evaluate", "evaluate_pair", "read_images", "training_digits"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, SyntaxError, NotImplementedError, RuntimeError)
"""What zipfile, numpy and Pillow raise on bytes that are damaged, encrypted or of another kind."""


@dataclass(frozen=True)
class Images:
    """Labelled images: ``pixels`` (N, H, W, C) uint8, ``labels`` (N,) int64, ``classes`` the class names or ()."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, mean: tuple[float, ...], std: tuple[float, ...], size: int = 250
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images (n, C, H, W) float32 and their labels (n,), in order."""
        centre, spread = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        for start in range(0, len(self), size):
            x = self.pixels[start : start + size].permute(0, 3, 1, 2).float() / 255
            yield (x - centre) / spread, self.labels[start : start + size]


@dataclass(frozen=True)
class Accuracy:
    """Shares in percent: ``top1``, ``top5``, and ``agreement`` with the teacher's top-1 where one was given."""

    top1: float
    top5: float
    images: int
    agreement: float | None = None


def read_images(data: str | Path, size: tuple[int, int, int] | None = None) -> Images:
    """The images of a ``.zip`` or folder in ImageFolder layout, an ``.npz`` with ``x`` and ``y``, or ``digits``.

    ImageFolder: one folder per class, numbered in sorted order; a root folder around them is fine. An ``.npz``
    has ``x`` (N, H, W, C) uint8 and ``y`` (N,) integers. ``digits`` is the part of scikit-learn's handwritten
    digits that the zoo's training never sees, ``digits-train`` the other.

    Images of ``size`` (C, H, W) stay as they are. Others are resized (bilinear, the shorter side to 8/7 of what
    is asked) and cropped at the centre. Without ``size``, all have the first one's height and width, in RGB.

    Raises:
        DataError: if the file is missing, empty, damaged, not of these forms, or has colour where one channel is asked.
        MissingExtra: if Pillow (images) or scikit-learn (``digits``) is not installed.
    """
    if str(data) in ("digits", "digits-train"):
        return _sized(_digits(held_out=str(data) == "digits"), size, str(data))
    path = Path(data)
    if not path.exists():
        raise DataError(f"no data at {path}: give a .zip or folder in ImageFolder layout, an .npz, or 'digits'")
    if path.is_dir():
        files = {f.relative_to(path).as_posix(): f.read_bytes for f in sorted(path.rglob("*")) if f.is_file()}
        return _image_folder(path, files, size)
    if path.suffix == ".npz":
        return _sized(_npz(path), size, str(path))
    if path.suffix == ".zip":
        with _reading(path), zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if not name.endswith("/"))
            return _image_folder(path, {name: partial(archive.read, name) for name in names}, size)
    raise DataError(f"{path} is not a .zip, a folder, an .npz or 'digits'")


def training_digits() -> Images:
    """The part of scikit-learn's handwritten digits that ``read_images("digits")`` holds out, for training the zoo.

    Raises:
        MissingExtra: if scikit-learn is not installed.
    """
    return _digits(held_out=False)


def evaluate(
    module: nn.Module,
    images: Images,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    teacher: nn.Module | None = None,
    batch_size: int = 250,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """The accuracy of ``module`` in eval mode on all images, in order, and its agreement with ``teacher``.

    Works on copies, so neither network changes. ``progress(done, total)`` counts images.

    Raises:
        DataError: if channels or classes of the images are not those of the network.
    """
    networks = [module] if teacher is None else [module, teacher]
    return _measure(networks, images, mean, std, batch_size, device, progress)[0]


def evaluate_pair(
    teacher: nn.Module,
    student: nn.Module,
    images: Images,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int = 250,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Accuracy, Accuracy]:
    """The accuracies of both, and the student's agreement, for one pass of each; else as ``evaluate``."""
    low, exact = _measure([student, teacher], images, mean, std, batch_size, device, progress)
    return replace(exact, agreement=None), low


def _measure(
    networks: Sequence[nn.Module],
    images: Images,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    device: str | torch.device,
    progress: Callable[[int, int], None] | None,
) -> list[Accuracy]:
    """The accuracy of each of ``networks``; all agreements, if there is more than one, are with the last."""
    channels = images.pixels.shape[-1]
    if not len(mean) == len(std) == channels:
        raise DataError(f"images of {channels} channels, with mean {mean} and std {std}: give one number per channel")
    copies = [copy.deepcopy(network).to(device).eval() for network in networks]
    right, near, agreed = ([0] * len(copies) for _ in range(3))
    done = 0
    with torch.no_grad():
        for batch, targets in images.batches(mean, std, batch_size):
            x, labels = batch.to(device), targets.to(device)
            found = [network(x) for network in copies]
            for index, logits in enumerate(found):
                _check_logits(logits)
                check_images(images, logits.shape[1])
                best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (n, 5)
                right[index] += int((best[:, 0] == labels).sum())
                near[index] += int((best == labels[:, None]).sum())
                agreed[index] += int((best[:, 0] == found[-1].argmax(1)).sum())
            done += len(labels)
            if progress is not None:
                progress(done, len(images))
    share, alone = 100 / done, len(copies) == 1
    counts = zip(right, near, agreed, strict=True)
    return [Accuracy(r * share, n * share, done, None if alone else a * share) for r, n, a in counts]


def check_images(images: Images, outputs: int) -> None:
    """Returns if the classes of ``images`` can be those of a network with ``outputs`` logits.

    Raises:
        DataError: if they are more or fewer, or a label is too large.
    """
    if images.classes and len(images.classes) != outputs:
        few = ", ".join(images.classes[:3])
        raise DataError(f"the images have {len(images.classes)} classes ({few}, ...), the network has {outputs}")
    if int(images.labels.max()) >= outputs:
        raise DataError(f"a label is {int(images.labels.max())}, the network has {outputs} classes (0..{outputs - 1})")


def _check_logits(logits: Any) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"the network returns {found}, accuracy needs logits (N, K)")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a damaged file raises, as one ``DataError``."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, *_UNREADABLE) as error:
        raise DataError(f"{path} cannot be read ({error}): is it complete?") from error


def _image_folder(path: Path, files: Mapping[str, Callable[[], bytes]], size: tuple[int, int, int] | None) -> Images:
    """The images of ``files``, whose names are ``[root/]class/image.jpg``."""
    parts = {name: PurePosixPath(name).parts for name in files if _is_image(name)}
    if not parts:
        raise DataError(f"no images in {path}: ImageFolder layout is CLASS/IMAGE with one of {', '.join(_SUFFIXES)}")
    while len({p[0] for p in parts.values()}) == 1 and all(len(p) > 2 for p in parts.values()):
        parts = {name: p[1:] for name, p in parts.items()}  # a root folder around the classes
    if loose := next((name for name, p in parts.items() if len(p) < 2), None):
        raise DataError(f"{loose} in {path} is in no class folder: ImageFolder layout is CLASS/IMAGE")
    classes = tuple(sorted({p[0] for p in parts.values()}))
    number = {name: index for index, name in enumerate(classes)}
    pixels: np.ndarray[Any, Any] | None = None
    for index, name in enumerate(parts):
        image = _decode(path, name, files[name], size)
        if pixels is None:
            pixels = np.empty((len(parts), *image.shape), np.uint8)
        if image.shape != pixels.shape[1:]:
            found, first = image.shape[:2], pixels.shape[1:3]
            raise DataError(f"{name} in {path} is {found[0]}x{found[1]}, the first image {first[0]}x{first[1]}")
        pixels[index] = image
    labels = torch.tensor([number[p[0]] for p in parts.values()])
    return Images(torch.from_numpy(pixels), labels, classes)


def _is_image(name: str) -> bool:
    file = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in file.parts)
    return file.suffix.lower() in _SUFFIXES and not hidden


def _decode(
    path: Path, name: str, read: Callable[[], bytes], size: tuple[int, int, int] | None
) -> np.ndarray[Any, Any]:
    """One image file as (H, W, C) uint8."""
    pillow = _pillow()
    try:
        with pillow.open(io.BytesIO(read())) as image:
            grey = image.mode in ("1", "L", "LA")
            if size is not None and size[0] == 1 and not grey:
                raise DataError(f"{name} in {path} has colour ({image.mode}), the network takes one channel")
            image = image.convert("L" if size is not None and size[0] == 1 else "RGB")
            return _fitted(image, size)
    except (zipfile.BadZipFile, zlib.error, pillow.DecompressionBombError, *_UNREADABLE) as error:
        raise DataError(f"{name} in {path} cannot be read ({error}): is it complete?") from error


def _fitted(image: "Image.Image", size: tuple[int, int, int] | None) -> np.ndarray[Any, Any]:
    """The image as (H, W, C) uint8, resized and cropped unless it has the height and width of ``size`` (C, H, W)."""
    if size is not None and (image.height, image.width) != size[1:]:
        _, height, width = size
        scale = max(height / image.height, width / image.width) * 8 / 7
        full = round(image.width * scale), round(image.height * scale)
        left, top = round((full[0] - width) / 2), round((full[1] - height) / 2)
        image = image.resize(full, _pillow().Resampling.BILINEAR).crop((left, top, left + width, top + height))
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def _sized(images: Images, size: tuple[int, int, int] | None, source: str) -> Images:
    """The images at ``size`` (C, H, W)."""
    _, height, width, channels = images.pixels.shape
    if size is None or (channels, height, width) == size:
        return images
    if channels != size[0] or channels not in (1, 3):
        raise DataError(f"{source} has images of {channels} channels, the network takes {size[0]}")
    pillow = _pillow()
    arrays = [pillow.fromarray(x.squeeze(-1) if channels == 1 else x) for x in images.pixels.numpy()]
    return Images(torch.from_numpy(np.stack([_fitted(x, size) for x in arrays])), images.labels, images.classes)


def _npz(path: Path) -> Images:
    with _reading(path), path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        keys = list(getattr(file, "files", ()))
        arrays = {key: file[key] for key in ("x", "y") if key in keys}
    if len(arrays) < 2:
        raise DataError(f"{path} has {', '.join(keys) or 'no arrays'}: an .npz of images has x (N, H, W, C) and y (N,)")
    x, y = arrays["x"], arrays["y"]
    if x.dtype != np.uint8 or x.ndim != 4:
        raise DataError(f"x in {path} is {x.dtype} {x.shape}: it must be uint8 (N, H, W, C)")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise DataError(f"y in {path} is {y.dtype} {y.shape}: it must be {len(x)} integers, one per image")
    if x.size == 0:
        raise DataError(f"no images in {path}: x is {x.shape}")
    if y.min() < 0:
        raise DataError(f"a label in {path} is {y.min()}: labels count from 0")
    return Images(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)))


def _digits(*, held_out: bool) -> Images:
    """One part of scikit-learn's digits, (N, 8, 8, 1): 70 % to train on, 30 % held out, always the same."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("digits come with scikit-learn: pip install 'zsq[digits]'") from error
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    cut = len(order) * 7 // 10
    part = order[cut:] if held_out else order[:cut]
    pixels = (torch.from_numpy(bunch.images) * 255 / 16).round().to(torch.uint8)[..., None]  # grey levels are 0..16
    return Images(pixels[part], torch.from_numpy(bunch.target).long()[part], tuple("0123456789"))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("images are decoded by Pillow: pip install pillow") from error
    return Image
