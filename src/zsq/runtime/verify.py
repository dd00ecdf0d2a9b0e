"""Whether an exported file is right: by its structure, and by its numbers on each runtime."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from zsq.api import load, read_metrics
from zsq.core import CheckpointError
from zsq.evaluate import Images, check_images, read_images
from zsq.export import Plan, find_target, plan
from zsq.export.lower import IntegerActivation, IntegerBias, integer_weight
from zsq.export.onnx import onnx_bytes
from zsq.nets.graph import layers, module_of
from zsq.nets.load import Network
from zsq.runtime.adapters import images_of
from zsq.runtime.files import about, read_onnx
from zsq.runtime.numerics import Distance, Labels, distance
from zsq.runtime.sessions import NAMES, RuntimeFailure, Session, installed, require
from zsq.runtime.structure import (
    FloatLayer,
    Graph,
    Grid,
    Integers,
    bias_faults,
    grid_faults,
    integer_faults,
    not_between_integers,
    not_by_onnxruntime,
    not_by_openvino,
)
from zsq.runtime.worker import Array

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Check", "Verification", "verify"]

_RUNTIMES = {".onnx": ("onnxruntime", "onnxruntime-unoptimised", "openvino"), ".xml": ("openvino",)}
_MOST_IMAGES = 256
"""Synthetic images that are compared, at most."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool | None
    """None where it could not be looked at: ``says`` tells why."""
    says: tuple[str, ...]
    """What was found, or a sentence for each fault."""


@dataclass(frozen=True)
class Verification:
    """What was found about a file."""

    file: str
    about: Mapping[str, str]
    """What the file says of itself."""
    checks: tuple[Check, ...]
    numbers: Mapping[str, tuple[Distance, ...]]
    """By set of images: the float network, the simulation, and what each runtime made of the file."""

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(check.passed is not False for check in self.checks)


@dataclass
class _Case:
    """A file, what it was made of, and what was found so far."""

    file: Path
    graph: Graph
    """Of the file; for OpenVINO's, of the ONNX file that it is made of."""
    plan: Plan
    student: fx.GraphModule
    network: Network
    checks: list[Check] = field(default_factory=list)

    def found(self, name: str, faults: Iterable[str], fine: str) -> None:
        """Add a check, which failed if there are ``faults``."""
        sentences = tuple(faults)
        self.checks.append(Check(name, not sentences, sentences or (fine,)))


class _Comparison:
    """Images (N, C, H, W), the labels (N,) they may have, and how far from the simulation and from float all are."""

    def __init__(self, case: _Case, images: Array, labels: Labels | None) -> None:
        self.images, self._labels = images, labels
        self._exact, self._simulation = (_logits(each, images) for each in (case.network.module, case.student))
        self.found: list[Distance] = []
        self.add("float network", self._exact)
        self.add("simulation", self._simulation)

    def add(self, name: str, logits: Array) -> None:
        """Compare the ``logits`` (N, K) of ``name``."""
        self.found.append(distance(name, logits, self._simulation, self._exact, self._labels))


def verify(
    file: str | Path,
    run: str | Path,
    *,
    data: str | Path | Images | None = None,
    model: str | nn.Module | Network | None = None,
    threads: int = 1,
    progress: Callable[[str, int, int], None] = lambda label, done, count: None,
) -> Verification:
    """What is right and what is wrong about ``file`` (.onnx or .xml), which was exported from the folder ``run``.

    Looked at are the file; the weights, biases and grids in it; the kernels that ONNX Runtime and OpenVINO take; and
    the logits of both beside the simulation and the float network: on the images of the run, or on noise where its
    method makes none, and on ``data``. Of an .xml, what OpenVINO makes of it. ``model`` is needed if the run was made
    from a module in memory.

    Raises:
        CheckpointError: if the file is missing, incomplete, of another kind, or exported from another run.
        MissingExtra: if onnx, or the runtime of the file, is not installed. Without a second one, a check says so.
        ZsqError: if the run or the data cannot be read.
    """
    path = Path(file)
    if path.suffix not in _RUNTIMES:
        raise CheckpointError(f"{file} is none of {', '.join(_RUNTIMES)}: others are not verified here")
    runtimes = _RUNTIMES[path.suffix]
    require("onnx", runtimes[0])
    says = about(path)
    student, network = _made_of(says, path, run, model)
    sets = _images(run, data, network)
    planned = plan(student, network.input_shape, find_target(says.get("target", "")), {})
    content = read_onnx(path) if path.suffix == ".onnx" else _as_onnx(planned)
    case = _Case(path, Graph(content), planned, student, network)
    if path.suffix == ".onnx":
        if fault := _invalid(content):
            case.found("file", [fault], "")  # what is no valid graph is not handed to a runtime
            return Verification(str(file), says, tuple(case.checks), {})
        case.found("file", [], "a valid ONNX file")
        _check_values(case)
    compared = {name: _Comparison(case, *each) for name, each in sets.items()}
    for index, runtime in enumerate(runtimes):
        progress(f"verify on {NAMES[runtime]}", index, len(runtimes))
        if not installed(runtime):
            case.checks.append(Check(NAMES[runtime], None, ("not looked at, because it is not installed",)))
            continue
        try:
            with Session(runtime, case.file, threads) as session:
                _check_kernels(case, session)
                for each in compared.values():
                    each.add(NAMES[runtime], session.logits(each.images))
        except RuntimeFailure as failure:
            case.found(NAMES[runtime], [str(failure)], "")
    for name, each in compared.items():
        faults = [f"{one.name} {one.fault}" for one in each.found if one.fault]
        case.found(f"numbers, {name}", faults, "all as near to the float network as the simulation")
    numbers = {name: tuple(each.found) for name, each in compared.items()}
    return Verification(str(file), says, tuple(case.checks), numbers)


def _made_of(
    says: Mapping[str, str], file: Path, run: str | Path, model: str | nn.Module | Network | None
) -> tuple[fx.GraphModule, Network]:
    """The student and the network of ``run``, from which the ``file`` ``says`` that it was made."""
    metrics = read_metrics(run)
    if not says:
        raise CheckpointError(f"{file} was not exported by zsq: it does not say from which run it was made")
    for key in ("teacher", "method", "bits", "seed"):
        if says.get(key) != str(metrics[key]):
            raise CheckpointError(f"{file} was exported from another run: {key} {says.get(key)}, not {metrics[key]}")
    return load(run, model)


def _as_onnx(planned: Plan) -> "ModelProto":
    import onnx

    content = onnx_bytes(planned.graph, planned.input_shape, planned.target, {})
    return onnx.load_model_from_string(content)


def _images(
    run: str | Path, data: str | Path | Images | None, network: Network
) -> dict[str, tuple[Array, Labels | None]]:
    """What is compared, by name: images, normalised, and their labels if they have some."""
    if read_metrics(run)["images"]:
        images = images_of(run)[:_MOST_IMAGES]
        name = f"{len(images)} images of the run"
    else:
        rng = torch.Generator().manual_seed(0)
        images = torch.randn(64, *network.input_shape, generator=rng).numpy()
        name = f"{len(images)} images of Gaussian noise (the run made none)"
    sets: dict[str, tuple[Array, Labels | None]] = {name: (images, None)}
    if data is not None:
        given = data if isinstance(data, Images) else read_images(data, network.input_shape)
        check_images(given, network.classes)
        pixels = torch.cat([x for x, _ in given.batches(network.mean, network.std)])
        sets[f"{len(given)} images of the data"] = pixels.numpy(), given.labels.numpy()
    return sets


def _logits(network: nn.Module, images: Array) -> Array:
    with torch.no_grad():
        parts = [network.eval()(batch) for batch in torch.from_numpy(images).split(64)]
    return torch.cat(parts).numpy()


def _invalid(model: "ModelProto") -> str | None:
    """What ONNX's own checker and shape inference say against a file."""
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return f"the ONNX checker refuses it: {str(error).strip().splitlines()[0]}"
    domains = [each.domain for each in model.opset_import]
    return None if domains == [""] else f"it imports {len(domains)} operator sets, where runtimes need 1"


def _check_values(case: _Case) -> None:
    """Weights, biases and grids are those of the run, and as integer kernels take them."""
    kind, integers = case.plan.target.activations, _integers(case.plan.graph)
    faults = integer_faults(case.graph, integers)
    case.found("integers", faults, f"weights and biases of {len(integers)} layers, all as in the run")
    count, wrong = bias_faults(case.graph)
    case.found("biases", wrong.values(), f"{count} in int32, all at activation scale x weight scale")
    grids = _grids(case.plan.graph)
    case.found(
        "grids", grid_faults(case.graph, kind, grids), f"{len(grids)} of activations, all {kind} and as in the run"
    )


def _integers(lowered: fx.GraphModule) -> dict[str, Integers]:
    """The integers of each layer of the run, as the target holds them, by dotted name."""
    found = {}
    for node in layers(lowered):
        layer = module_of(node)
        if layer is not None and (weight := integer_weight(layer)) is not None:
            bias = layer.get_submodule("parametrizations.bias.0") if is_parametrized(layer, "bias") else None
            codes = bias.codes.numpy() if isinstance(bias, IntegerBias) else None
            found[str(node.target)] = Integers(weight.codes.numpy(), weight.scale.numpy(), codes)
    return found


def _grids(lowered: fx.GraphModule) -> list[Grid]:
    """The grid of each activation of the run, as the target holds it."""
    quantizing = [module for node in lowered.graph.nodes if isinstance(module := module_of(node), IntegerActivation)]
    return [Grid(float(a.scale), int(a.zero_point), int(a.low), int(a.high)) for a in quantizing]


def _check_kernels(case: _Case, session: Session) -> None:
    """The layers that the plan has in integers have integer kernels."""
    target = case.plan.target
    if session.runtime == "onnxruntime-unoptimised":
        return
    if target.name not in ("ort-x86", "openvino"):
        if session.runtime == "onnxruntime":
            left = not_between_integers(case.graph)
            _kernels_found(case, f"structure for {target.name}", left, "read integers; not run on that target here")
        return
    if session.runtime == "onnxruntime":
        import onnx

        left = not_by_onnxruntime(case.graph, onnx.load_model_from_string(session.optimised))
    else:
        left = not_by_openvino(case.graph, session.layers)
    _kernels_found(case, f"kernels of {NAMES[session.runtime]}", left, "run in integers")


def _kernels_found(case: _Case, name: str, left: list[FloatLayer], what: str) -> None:
    """Add a check that fails if layers are ``left`` that are to run in integers."""
    kinds = Counter(node.op_type for node in case.graph.computing)
    count = sum(kinds.values())
    which = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    planned = case.plan.floating
    faults = [each for each in left if each.fault and each.name not in planned]
    says = [f"{count - len(left)} of {count} layers ({which}) {what}"]
    says += [f"{each.name} is left in float: {each.reason}" for each in faults]
    says += [f"{each.name} is no fault: {each.reason}" for each in left if not each.fault]
    says += [f"{each.name} is float by plan: {planned[each.name]}" for each in left if each.name in planned]
    case.checks.append(Check(name, not faults, tuple(says)))
