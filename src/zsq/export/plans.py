"""What will become of a student on a target, said before anything is written; and the writing."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from zsq.core import MissingExtra, RecipeError, RunError
from zsq.core.run import save_atomically
from zsq.export.lower import Dialect, integer_weight, lower, why_float
from zsq.export.onnx import Onnx, narrowed, onnx_bytes
from zsq.export.openvino import openvino_bytes
from zsq.export.pt2e import Decomposed, pt2_bytes
from zsq.export.targets import Target, find_target
from zsq.nets.graph import layers, matmuls, module_of

__all__ = ["Plan", "plan"]

_EXTRAS = {
    ".onnx": ("onnx", ("onnx", "onnx_ir", "onnxscript", "ml_dtypes")),
    ".xml": ("openvino", ("onnx", "onnx_ir", "onnxscript", "ml_dtypes", "openvino")),
    ".pt2": ("pt2e", ()),  # torchao runs the file; torch alone writes it
}
"""The extra that writes a file, and the packages of it that are imported."""


@dataclass(frozen=True)
class Plan:
    """A student as ``target`` will see it."""

    target: Target
    graph: fx.GraphModule
    """The lowered student."""
    input_shape: tuple[int, int, int]
    """(C, H, W)."""
    about: Mapping[str, str]
    """What the file says of itself."""
    integer: tuple[str, ...]
    """Layers and matrix products that compute in integers, by dotted name."""
    floating: Mapping[str, str]
    """The others, and why."""
    int4: int
    """How many weights fit into 4 bits."""

    def lines(self) -> list[str]:
        """What a user should know before the file is written, in sentences."""
        count = len(self.integer) + len(self.floating)
        said = [f"{len(self.integer)} of {count} layers and matrix products compute in integers"]
        said += [f"{name} stays float: {reason}" for name, reason in self.floating.items()]
        if self.target.int4 and self.int4:
            said.append(f"{self.int4} weights are stored in 4 bits")
        said.append(f"speed of integers: {self.target.integer}")
        if self.floating:
            said.append(f"speed of what stays float: {self.target.floating}")
            if self.about.get("zsq.protocol") not in (None, self.target.protocol.name):
                said.append(f"quantizers where {self.target.name} wants them: --protocol {self.target.protocol.name}")
        return said

    def write(self, out: str | Path, force: bool = False) -> Path:
        """Write the file, all of it or nothing, and return its path; one that exists stays unless ``force``.

        Raises:
            RunError: if ``out`` exists or cannot be written.
            RecipeError: if its suffix is not the target's.
            UnsupportedModel: if the network has an operation that the format does not.
        """
        path = Path(out)
        if path.suffix != self.target.suffix:
            raise RecipeError(f"{self.target.name} writes {self.target.suffix} files: {path} has another suffix")
        for each in self.files(path):
            if each.exists() and not force:
                raise RunError(f"{each} exists: choose another name, or overwrite it with --force")
        place = next(parent for parent in path.absolute().parents if parent.exists())
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)) or path.is_dir():
            raise RunError(f"cannot write {path}: choose a place that can be written")
        if path.suffix == ".pt2":
            save_atomically(path, pt2_bytes(self.graph, self.input_shape, self.about))
            return path
        content = onnx_bytes(self.graph, self.input_shape, self.target, self.about)
        if path.suffix == ".xml":
            content, weights = openvino_bytes(content, self.about)
            save_atomically(path.with_suffix(".bin"), weights)  # first: an .xml never stands without its weights
        save_atomically(path, content)
        return path

    def files(self, out: str | Path) -> list[Path]:
        """What ``write`` writes for ``out``: one file, or two for OpenVINO."""
        path = Path(out)
        return [path, path.with_suffix(".bin")] if self.target.suffix == ".xml" else [path]


def plan(
    student: fx.GraphModule, input_shape: tuple[int, int, int], target: str | Target, about: Mapping[str, str]
) -> Plan:
    """How ``student``, which is frozen, will run on ``target``; nothing is written yet.

    Raises:
        RecipeError: if there is no such target.
        MissingExtra: if the packages that write its files are not installed.
        UnsupportedModel: if the student has a layer that cannot be exported, or a grid that the target cannot hold.
    """
    target = find_target(target)
    extra, packages = _EXTRAS[target.suffix]
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise MissingExtra(f"{target.name} needs {', '.join(missing)}: pip install 'zsq[{extra}]'")
    ops: Dialect = Decomposed() if target.suffix == ".pt2" else Onnx()
    graph = lower(student, target, ops)
    nodes = [*layers(graph), *(product.node for product in matmuls(graph))]
    reasons = {str(node.target) if node.op == "call_module" else node.name: why_float(node, target) for node in nodes}
    codes = [kept.codes for node in layers(graph) if (kept := integer_weight(module_of(node))) is not None]
    return Plan(
        target=target,
        graph=graph,
        input_shape=input_shape,
        about={**about, "zsq.target": target.name},
        integer=tuple(name for name, reason in reasons.items() if reason is None),
        floating={name: reason for name, reason in reasons.items() if reason is not None},
        int4=sum(narrowed(each.numpy()) is not None for each in codes),
    )
