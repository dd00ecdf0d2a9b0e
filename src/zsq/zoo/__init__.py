"""The shipped networks: small, trained by ``zsq.zoo.train``, with a model card each in ``cards/``."""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources

import safetensors.torch
import torch
from torch import Tensor, nn

from zsq.core.errors import CheckpointError, UnsupportedModel
from zsq.zoo.networks import MobileNetV2, ResNet, vision_transformer
from zsq.zoo.pytorchcv import from_pytorchcv

__all__ = ["MODELS", "Entry", "entry", "load_weights", "parameters", "top1"]

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One shipped network: how it is built, and what it expects."""

    name: str
    build: Callable[[], nn.Module]
    """Makes the network with fresh weights."""
    input_shape: tuple[int, int, int]
    """(C, H, W)."""
    mean: tuple[float, ...]
    """Per channel, of images in 0..1."""
    std: tuple[float, ...]
    """Per channel, of images in 0..1."""
    data: str
    """What it was trained on, in one line."""
    class_names: tuple[str, ...]
    """In the order of the logits."""
    half: bool = False
    """Whether its file holds float16, to be half as large; the network computes as float32."""
    rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    """From the key names of another library's checkpoints, where one has this network."""

    @property
    def classes(self) -> int:
        """The number of logits."""
        return len(self.class_names)


MODELS: dict[str, Entry] = {
    model.name: model
    for model in (
        Entry(
            name="digits-resnet",
            build=partial(ResNet, depth=3, widths=(4, 8, 16), classes=10, channels=1),
            input_shape=(1, 8, 8),
            mean=(0.3048,),
            std=(0.3755,),
            data="scikit-learn's handwritten digits, 8x8 grey",
            class_names=tuple("0123456789"),
        ),
        Entry(
            name="resnet20-cifar10",
            build=partial(ResNet, depth=3, widths=(16, 32, 64), classes=10),
            input_shape=(3, 32, 32),
            mean=_CIFAR10_MEAN,
            std=_CIFAR10_STD,
            data="CIFAR-10, 32x32 colour, as JPEG of quality 75",
            class_names=_CIFAR10,
            rename=from_pytorchcv,
        ),
        Entry(
            name="mobilenetv2-cifar10",
            build=partial(MobileNetV2, classes=10),
            input_shape=(3, 32, 32),
            mean=_CIFAR10_MEAN,
            std=_CIFAR10_STD,
            data="CIFAR-10, 32x32 colour, as JPEG of quality 75",
            class_names=_CIFAR10,
        ),
        Entry(
            name="vit-cifar10",
            build=partial(vision_transformer, size=32, patch=4, width=192, depth=6, heads=3, classes=10),
            input_shape=(3, 32, 32),
            mean=_CIFAR10_MEAN,
            std=_CIFAR10_STD,
            data="CIFAR-10, 32x32 colour, as JPEG of quality 75",
            class_names=_CIFAR10,
            half=True,
        ),
    )
}


def entry(name: str) -> Entry:
    """The shipped network of this name.

    Raises:
        UnsupportedModel: if there is none; the message lists those that are close, or all.
    """
    if name not in MODELS:
        names = difflib.get_close_matches(name, MODELS) or list(MODELS)
        raise UnsupportedModel(f"no network {name!r} in the zoo: it has {', '.join(names)}")
    return MODELS[name]


def load_weights(name: str) -> nn.Module:
    """The shipped network of this name with its trained weights, in eval mode.

    Raises:
        UnsupportedModel: if there is no such network.
        CheckpointError: if its weights are not part of this installation.
    """
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced
        model = entry(name).build()
    file = resources.files("zsq.zoo") / "weights" / f"{name}.safetensors"
    if not file.is_file():
        raise CheckpointError(f"the weights of {name} are not part of this installation: train them with zsq.zoo.train")
    model.load_state_dict(safetensors.torch.load(file.read_bytes()))
    return model.eval()


def parameters(name: str) -> int:
    """The number of parameters of the shipped network of this name, as its model card states it.

    >>> parameters("digits-resnet")
    17462
    """
    stated = re.search(r"([\d,]+) parameters", _card(name))
    assert stated is not None, f"the card of {name} does not say how large it is"
    return int(stated[1].replace(",", ""))


def top1(name: str) -> float | None:
    """The top-1 accuracy in percent that the model card states; None if it states none."""
    stated = re.search(r"^\| Top-1 \| ([\d.]+) %", _card(name), re.MULTILINE)
    return float(stated[1]) if stated else None


def _card(name: str) -> str:
    return (resources.files("zsq.zoo") / "cards" / f"{entry(name).name}.md").read_text()
