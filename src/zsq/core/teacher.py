"""Teacher and View: the frozen network, and what one forward pass of it showed."""

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zsq.core.bn import BNInput, BNRecorder
from zsq.core.errors import MissingView, UnsupportedModel

__all__ = ["Teacher", "View"]


class View:
    """What one forward pass showed. Reading what was not asked for is an error in words, never None."""

    def __init__(self, images: Tensor, logits: Tensor, **seen: Any) -> None:
        self.images = images
        """(N, C, H, W), normalised."""
        self.logits = logits
        """(N, K), the teacher's."""
        self._seen = {name: value for name, value in seen.items() if value is not None}

    def _get(self, name: str) -> Any:
        if name not in self._seen:
            raise MissingView(f"no {name} in this view: list it in the loss's `needs`, or give the images {name}")
        return self._seen[name]

    @property
    def labels(self) -> Tensor:
        """Class indices (N,)."""
        labels: Tensor = self._get("labels")
        return labels

    @property
    def student(self) -> Tensor:
        """The student's logits (N, K) on the same images."""
        logits: Tensor = self._get("student")
        return logits

    @property
    def bn(self) -> list[BNInput]:
        """The inputs of the BatchNorm layers in the order in which they ran."""
        inputs: list[BNInput] = self._get("bn")
        return inputs


class Teacher:
    """A frozen copy of the full-precision network in eval mode, and a way to look into it.

    The module handed in is never changed; parameters of the copy do not require gradients, images may.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @property
    def offers(self) -> frozenset[str]:
        """What this network can show: ``"bn"`` if it has BatchNorm layers with running statistics."""
        return frozenset({"bn"}) if self._batchnorms() else frozenset()

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def view(self, images: Tensor, needs: frozenset[str] = frozenset(), **more: Any) -> View:
        """One forward pass of ``images`` (N, C, H, W), recording only what is in ``needs``; ``more`` is passed on.

        Raises:
            UnsupportedModel: if BatchNorm inputs are asked for and no layer calls torch's ``batch_norm``.
        """
        if "bn" not in needs:
            return View(images, self.module(images), **more)
        with BNRecorder() as recorder:
            logits: Tensor = self.module(images)
        if not recorder.seen:
            raise UnsupportedModel("no BatchNorm layer ran torch.nn.functional.batch_norm: its input cannot be seen")
        return View(images, logits, bn=recorder.seen, **more)

    def changed(self, change: Callable[[nn.Module], nn.Module]) -> "Teacher":
        """A teacher made of a changed copy of the network; ``change`` may modify its argument."""
        return Teacher(change(copy.deepcopy(self.module)))

    def digest(self) -> str:
        """A SHA-256 of every parameter and buffer with its name: the identity of the network."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def _batchnorms(self) -> list[_BatchNorm]:
        return [m for m in self.module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
