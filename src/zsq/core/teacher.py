"""Teacher and View: the frozen network, and what one forward pass of it showed."""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zsq.core.attention import Attention, AttentionRecorder
from zsq.core.bn import BNInput, BNRecorder
from zsq.core.errors import MissingView, UnsupportedModel

__all__ = ["Landmarks", "Teacher", "View", "look", "only_tokens"]


@dataclass(frozen=True)
class Landmarks:
    """Layers by what they are in a network, as dotted names that teacher and student share."""

    classifier: str = ""
    """The last layer that runs; what it reads are the features."""
    convolution: str = ""
    """The last convolution whose output has more than one pixel."""
    branches: tuple[str, ...] = ()
    """What ends each residual branch, before its addition; in a network without, what ends each convolution."""
    attention: int = 0
    """How many products of attention there are."""
    tokens: str = ""
    """What makes the tokens (N, T, D) that enter the first transformer block: each may be left out from there on."""
    prefix: int = 0
    """How many of these tokens come before the patches: the class token, registers."""
    grid: tuple[int, int] = (0, 0)
    """Rows and columns of the patches, which are the other tokens, row by row."""


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
    def pixels(self) -> Tensor:
        """The images (N, C, H, W) before they were moved for this look."""
        pixels: Tensor = self._seen.get("pixels", self.images)
        return pixels

    @property
    def labels(self) -> Tensor:
        """Class indices (N,); below 0 where no label is believed. Or the shares of the classes (N, K)."""
        labels: Tensor = self._get("labels")
        return labels

    @property
    def student(self) -> Tensor:
        """The student's logits (N, K) on the same images."""
        logits: Tensor = self._get("student")
        return logits

    @property
    def features(self) -> Tensor:
        """What the teacher's classifier read (N, D)."""
        features: Tensor = self._get("features")
        return features

    @property
    def branches(self) -> tuple[list[Tensor], list[Tensor]]:
        """The ends of the residual branches (N, C, H, W), the teacher's and the student's."""
        return self._get("branches"), self._get("student_branches")

    @property
    def maps(self) -> tuple[Tensor, Tensor]:
        """The outputs of the last convolution (N, C, H, W), the teacher's and the student's; logits depend on both."""
        return self._get("maps"), self._get("student_maps")

    def relabelled(self, labels: Tensor) -> "View":
        """The same view with other labels (N,)."""
        return View(self.images, self.logits, **{**self._seen, "labels": labels})

    @property
    def labelled(self) -> bool:
        """Whether the images were made for labels."""
        return "labels" in self._seen

    @property
    def bn(self) -> list[BNInput]:
        """The inputs of the BatchNorm layers in the order in which they ran."""
        inputs: list[BNInput] = self._get("bn")
        return inputs

    @property
    def attention(self) -> list[Attention]:
        """What the products of attention computed, in the order in which they ran."""
        products: list[Attention] = self._get("attention")
        return products


class Teacher:
    """A frozen copy of the full-precision network in eval mode, and a way to look into it.

    The module handed in is never changed; parameters of the copy do not require gradients, images may.
    """

    def __init__(self, module: nn.Module, landmarks: Landmarks = Landmarks()) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.landmarks = landmarks

    @property
    def offers(self) -> frozenset[str]:
        """What can be seen: ``"bn"`` where BatchNorm has running statistics, and what is known at its landmarks."""
        marks = self.landmarks
        shown = {
            "bn": self._batchnorms(),
            "features": marks.classifier,
            "branches": marks.branches,
            "maps": marks.convolution,
            "attention": marks.attention,
            "tokens": marks.tokens,
            "class_token": marks.tokens and marks.prefix,
        }
        return frozenset(name for name, found in shown.items() if found)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def view(
        self,
        images: Tensor,
        needs: frozenset[str] = frozenset(),
        *,
        tokens: Tensor | None = None,
        **more: Any,
    ) -> View:
        """One forward pass of ``images`` (N, C, H, W), recording only what is in ``needs``; ``more`` is passed on.

        ``tokens`` (N, k) are the tokens of each image that go on into the first transformer block; None is all.

        Raises:
            UnsupportedModel: if BatchNorm inputs or attention are asked for and no layer calls torch's functions.
        """
        recorders: dict[str, Any] = {"bn": BNRecorder(), "attention": AttentionRecorder(self.landmarks.prefix)}
        recorders = {name: recorder for name, recorder in recorders.items() if name in needs}
        with contextlib.ExitStack() as stack:
            for recorder in recorders.values():
                stack.enter_context(recorder)
            logits, seen = look(self.module, images, needs, self.landmarks, tokens)
        for name, recorder in recorders.items():
            if not recorder.seen:
                raise UnsupportedModel(_UNSEEN[name])
            seen[name] = recorder.seen
        return View(images, logits, **seen, **more)

    def changed(self, change: Callable[[nn.Module], nn.Module]) -> "Teacher":
        """A teacher made of a changed copy of the network; ``change`` may modify its argument."""
        return Teacher(change(copy.deepcopy(self.module)), self.landmarks)

    def digest(self) -> str:
        """A SHA-256 of every parameter and buffer with its name: the identity of the network."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def _batchnorms(self) -> list[_BatchNorm]:
        return [m for m in self.module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


_UNSEEN = {
    "bn": "no BatchNorm layer ran torch.nn.functional.batch_norm: its input cannot be seen",
    "attention": "no softmax of torch was the left operand of a product: attention cannot be seen",
}


def look(
    network: nn.Module,
    images: Tensor,
    needs: frozenset[str],
    landmarks: Landmarks,
    tokens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The logits of ``network`` (N, K), and what ``needs`` asks for at its landmarks, as keywords of a view.

    ``tokens`` (N, k) are those of each image that go on into the first transformer block; None is all.
    """
    with _watched(network, needs, landmarks) as seen, only_tokens(network, landmarks.tokens, tokens):
        logits: Tensor = network(images)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), seen


@contextlib.contextmanager
def only_tokens(network: nn.Module, name: str, tokens: Tensor | None) -> Iterator[None]:
    """A context in which the module ``name`` hands on ``tokens`` (N, k) alone of those it makes; None is all.

    Raises:
        UnsupportedModel: if tokens are to be left out of a network in which no module makes them.
    """
    if tokens is None:
        yield
        return
    if not name:
        raise UnsupportedModel("no module of this network makes tokens that can be left out")

    def gather(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.gather(1, tokens[:, :, None].expand(-1, -1, output.shape[2]))

    hook = network.get_submodule(name).register_forward_hook(gather)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _watched(network: nn.Module, needs: frozenset[str], landmarks: Landmarks) -> Iterator[dict[str, Any]]:
    seen: dict[str, Any] = {}
    hooks = []
    marks = {"features": landmarks.classifier, "branches": landmarks.branches, "maps": landmarks.convolution}
    if missing := [need for need, mark in marks.items() if need in needs and not mark]:
        raise UnsupportedModel(f"this network has no {' and no '.join(missing)} to look at")

    def features(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["features"] = inputs[0].flatten(1)

    def branch(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        seen["branches"].append(output.clone())  # the network may add to it in place

    def maps(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # the gradient of a logit by the map is wanted also where nothing before the map has one
        seen["maps"] = output if output.requires_grad else output.detach().requires_grad_()
        kept: Tensor = seen["maps"]
        return kept.clone()  # as above

    if "features" in needs:
        hooks.append(network.get_submodule(landmarks.classifier).register_forward_pre_hook(features))
    if "branches" in needs:
        seen["branches"] = []
        hooks += [network.get_submodule(name).register_forward_hook(branch) for name in landmarks.branches]
    if "maps" in needs:
        hooks.append(network.get_submodule(landmarks.convolution).register_forward_hook(maps))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
