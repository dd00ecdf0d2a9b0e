"""The control that is fed with real images: the same quantizer, and all else is equal."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from zsq.api import reads_images
from zsq.core import Batch, Job, Method, NoData, Recipe, RecipeError, Run
from zsq.evaluate import Images, check_images, read_images
from zsq.nets.load import Network
from zsq.synthesis import Noise

__all__ = ["Calibration", "RealImages", "images_digest"]


@dataclass(frozen=True, kw_only=True)
class RealImages(Recipe):
    """Real images with their true labels where a synthesizer's would be: a control, part of no method."""

    data: str
    """What they are called."""
    digest: str
    """A SHA-256 of all from which they were drawn."""
    samples: int
    images: Images = field(compare=False, repr=False)
    mean: tuple[float, ...] = field(compare=False)
    std: tuple[float, ...] = field(compare=False)

    live: ClassVar[bool] = False

    def parts(self) -> dict[str, Any]:
        """What names the images; a recipe is compared by it."""
        return {name: getattr(self, name) for name in ("data", "digest", "samples")}

    def stream(self, job: Job) -> Iterator[Batch]:
        """One batch of all."""
        for images, labels in self.images.batches(self.mean, self.std, self.samples):
            yield Batch(images.to(job.run.device), labels.to(job.run.device))


class Calibration:
    """The images from which the control on real images is drawn, at each size asked for."""

    def __init__(self, data: str | None) -> None:
        self._data = data
        self._read: dict[tuple[int, int, int], tuple[Images, str]] = {}
        self._drawn: dict[tuple[str, int, int], RealImages] = {}

    def draw(self, network: Network, recipe: Method, seed: int, data: str) -> RealImages | str:
        """As many real images as ``recipe`` makes, or why there is no such control; ``data`` is what is measured on."""
        name, synthesizer, shape = self._data, recipe.synthesizer, network.input_shape
        if isinstance(synthesizer, NoData | Noise) or not reads_images(recipe):
            return "makes no images"
        if synthesizer.live:
            return "has a generator that learns beside the student"
        if name is None:
            return "no --calibration was given"
        if shape not in self._read:
            images = read_images(name, shape)
            self._read[shape] = images, images_digest(images)
        images, digest = self._read[shape]
        check_images(images, network.classes)
        if digest == data:
            raise RecipeError(f"{name} is what is measured on: calibrate on other images, such as those of training")
        samples = int(getattr(synthesizer, "samples", 0))
        if len(images) < samples:
            raise RecipeError(f"{name} has {len(images)} images, and {recipe.name} makes {samples}: give more")
        key = network.name, samples, seed
        if key not in self._drawn:
            drawn = torch.randperm(len(images), generator=Run(seed=seed, device="cpu").fresh("real"))[:samples]
            self._drawn[key] = RealImages(
                data=Path(name).name,
                digest=digest,
                samples=samples,
                images=Images(images.pixels[drawn], images.labels[drawn], images.classes),
                mean=network.mean,
                std=network.std,
            )
        return self._drawn[key]


def images_digest(images: Images) -> str:
    """A SHA-256 of pixels and labels."""
    sha = hashlib.sha256(f"{tuple(images.pixels.shape)}".encode())
    for tensor in (images.pixels, images.labels):
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
