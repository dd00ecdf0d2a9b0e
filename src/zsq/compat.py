"""torchvision and timm, imported when they are asked for, also where torchvision's compiled part cannot load.

The torchvision wheel of the default package index is built for CUDA. Beside a CPU-only torch its compiled operators
fail to load, and its Python part then fails on ``register_fake`` for two of them. Declaring those two schemas is all
that the classification networks need; detection operators stay missing.
"""

import importlib
import sys
import warnings
from types import ModuleType

import torch

from zsq.core.errors import MissingExtra

__all__ = ["import_timm", "import_torchvision"]

_SYMPTOM = "operator torchvision::nms does not exist"
_SCHEMAS: list[torch.library.Library] = []
"""Declared schemas last as long as their library object."""


def import_torchvision() -> ModuleType:
    """The ``torchvision`` module; declares its operators' schemas if, and only if, it fails for want of them.

    Warns once where that was needed.

    Raises:
        MissingExtra: if torchvision is not installed, or does not import for another reason.
    """
    try:
        return _imported("torchvision")
    except RuntimeError as error:
        if _SYMPTOM not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _SCHEMAS.append(library)
    torchvision = _imported("torchvision")
    warnings.warn(
        f"torchvision {torchvision.__version__} was built for another torch than {torch.__version__}: networks work, "
        "its compiled operators (nms, image decoders) do not; install both from the same index to have them",
        stacklevel=2,
    )
    return torchvision


def import_timm() -> ModuleType:
    """The ``timm`` module, which imports torchvision.

    Raises:
        MissingExtra: if timm or torchvision is not installed, or does not import.
    """
    import_torchvision()
    return _imported("timm")


def _imported(name: str) -> ModuleType:
    if name not in sys.modules:
        for half in [module for module in sys.modules if module.startswith(f"{name}.")]:
            del sys.modules[half]  # left over from an import that failed
    try:
        return importlib.import_module(name)
    except ImportError as error:
        found = "is not installed" if getattr(error, "name", None) == name else f"does not import ({error})"
        raise MissingExtra(f"{name} {found}: pip install 'zsq[vision]'") from error
