"""The key names of pytorchcv's ``resnet20_cifar10``, so that its checkpoints fit our ResNet-20 and ours fit it."""

import re
from collections.abc import Mapping

from torch import Tensor

__all__ = ["from_pytorchcv", "to_pytorchcv"]

_PART = {"conv": "0", "bn": "1"}
_NAME = {part: name for name, part in _PART.items()}


def _from(key: str) -> str:
    if match := re.fullmatch(r"features\.init_block\.(conv|bn)\.(\w+)", key):
        return f"stem.{_PART[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"features\.stage(\d+)\.unit(\d+)\.(body\.)?(\w+)\.(conv|bn)\.(\w+)", key):
        stage, unit = int(match[1]) - 1, int(match[2]) - 1
        layer = "shortcut" if match[4] == "identity_conv" else match[4]
        return f"stages.{stage}.{unit}.{layer}.{_PART[match[5]]}.{match[6]}"
    return re.sub(r"^output\.", "head.", key)


def _to(key: str) -> str:
    if match := re.fullmatch(r"stem\.([01])\.(\w+)", key):
        return f"features.init_block.{_NAME[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"stages\.(\d+)\.(\d+)\.(\w+)\.([01])\.(\w+)", key):
        layer = "identity_conv" if match[3] == "shortcut" else f"body.{match[3]}"
        return f"features.stage{int(match[1]) + 1}.unit{int(match[2]) + 1}.{layer}.{_NAME[match[4]]}.{match[5]}"
    return re.sub(r"^head\.", "output.", key)


def from_pytorchcv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of ``zsq.zoo.networks.ResNet``; keys that pytorchcv does not have stay.

    >>> import torch
    >>> list(from_pytorchcv({"features.stage2.unit1.identity_conv.bn.weight": torch.ones(32)}))
    ['stages.1.0.shortcut.1.weight']
    """
    return {_from(key): value for key, value in state.items()}


def to_pytorchcv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under pytorchcv's names, the inverse of ``from_pytorchcv``.

    >>> import torch
    >>> list(to_pytorchcv({"stages.0.2.conv1.0.weight": torch.ones(16, 16, 3, 3)}))
    ['features.stage1.unit3.body.conv1.conv.weight']
    """
    return {_to(key): value for key, value in state.items()}
