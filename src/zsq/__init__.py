"""Zero-shot quantization: a pretrained vision network and no data in, a low-bit network out.

Names are loaded when they are first used, so that ``import zsq`` costs nothing. Accuracy on real images stays in a
module of its own: ``from zsq.evaluate import evaluate``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zsq.version import __version__

if TYPE_CHECKING:
    from zsq.api import Result, load, quantize, resolve, synthesize
    from zsq.core import Bits, Method, Paper, Recipe, ZsqError, diff, show
    from zsq.evaluate import Accuracy, Images, read_images
    from zsq.methods import BASELINES, METHODS
    from zsq.nets.load import Network, load_network

__all__ = [
    "BASELINES",
    "METHODS",
    "Accuracy",
    "Bits",
    "Images",
    "Method",
    "Network",
    "Paper",
    "Recipe",
    "Result",
    "ZsqError",
    "__version__",
    "diff",
    "load",
    "load_network",
    "quantize",
    "read_images",
    "resolve",
    "show",
    "synthesize",
]

_HOMES = {
    "zsq.api": ("Result", "load", "quantize", "resolve", "synthesize"),
    "zsq.core": ("Bits", "Method", "Paper", "Recipe", "ZsqError", "diff", "show"),
    "zsq.evaluate": ("Accuracy", "Images", "read_images"),
    "zsq.methods": ("BASELINES", "METHODS"),
    "zsq.nets.load": ("Network", "load_network"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zsq' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
