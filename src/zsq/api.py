"""The library in five calls: quantize, synthesize, load, evaluate, resolve."""

import hashlib
import io
import json
import platform
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, fx, nn

from zsq.core import (
    ALWAYS,
    Batch,
    Bits,
    Job,
    Method,
    NoData,
    Precision,
    RecipeError,
    Reporter,
    Run,
    RunError,
    Source,
    Synthesizer,
    Teacher,
    UnsupportedModel,
    needs,
    show,
    smoke,
)
from zsq.core.recipe import snake
from zsq.estimate import estimate_drop, image_sources, smoke_sources
from zsq.evaluate import Images, check_images, evaluate_pair, read_images
from zsq.export import Plan, Target, find_target, plan
from zsq.methods import BASELINES, METHODS, PLUGINS
from zsq.nets.graph import capture
from zsq.nets.load import Network, load_network
from zsq.quant import PROTOCOLS, Distill, InsertFakeQuant, QuantizationProtocol, under
from zsq.quant.placement import float_tensors
from zsq.quant.quantizers import freeze
from zsq.store import load_student, save_student
from zsq.version import __version__
from zsq.zoo import entry

__all__ = [
    "Effort",
    "Result",
    "check",
    "find_method",
    "images_key",
    "load",
    "plan_export",
    "protocol_of",
    "quantize",
    "reads_images",
    "resolve",
    "synthesize",
    "to_pixels",
]

Effort = Literal["smoke", "fast", "paper"]
SHOWN = 64
"""Images of a live synthesizer that are kept."""


@dataclass(frozen=True)
class Result:
    """A finished quantization."""

    student: fx.GraphModule
    """The low-bit network, a plain module in eval mode: images (N, C, H, W) to logits (N, K)."""
    recipe: Method
    metrics: dict[str, Any]
    """What happened, as in ``metrics.json``: accuracies in percent, sizes in bytes, seconds by stage ..."""
    images: Batch | None
    """The images that were synthesized; None for methods without."""
    folder: Path | None

    def save(self, path: str | Path) -> None:
        """Write the student as one safetensors file."""
        origin = {"teacher": self.metrics["teacher"], "method": self.recipe.name, "bits": self.metrics["bits"]}
        Path(path).write_bytes(save_student(self.student, origin))

    def export(self, out: str | Path, target: str | Target = "ort-x86", *, force: bool = False) -> Plan:
        """Write the student as a file that ``target`` runs in integers, and return what was planned for it.

        Raises:
            ZsqError: as ``plan_export`` and ``Plan.write`` say.
        """
        planned = plan(self.student, tuple(self.metrics["input_shape"]), target, _about(self.metrics))
        planned.write(out, force)
        return planned

    def report(self, out: str | Path | None = None, model: str | nn.Module | Network | None = None) -> Path:
        """Write one HTML page about the run, ``report.html`` in its folder, and return where.

        ``model`` is needed if it was handed in as a module.

        Raises:
            RunError: if the run was not kept in a folder.
            ZsqError: as ``zsq.report.write_report`` says.
        """
        from zsq.report import write_report

        if self.folder is None:
            raise RunError("this run was not kept in a folder: call quantize with out=FOLDER to report on it")
        return write_report(self.folder, out, model)


def quantize(
    model: str | nn.Module | Network,
    method: str | Method = "genie",
    bits: str | Bits = "w4a4",
    *,
    preset: str = "paper",
    effort: Effort = "paper",
    protocol: str | QuantizationProtocol | None = None,
    overrides: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    input_shape: tuple[int, int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    data: str | Path | Images | None = None,
    estimate: bool = True,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "float32",
    reporter: Reporter | None = None,
    synthesizer: Synthesizer | None = None,
    shared: str | Path | None = None,
) -> Result:
    """A low-bit copy of ``model``, made without data; ``model`` itself is not changed.

    ``precision`` "bfloat16" lets layers compute in it while a student is distilled or a generator learns beside it;
    what is measured is float32.
    ``data`` is only ever read to report accuracies, after everything is decided. ``estimate`` says without data what
    the student is believed to have lost, as ``zsq.estimate`` counts it. With ``out`` the run keeps its progress there:
    the same call after an interruption continues and ends with the same bits.
    ``synthesizer`` takes the place of the method's own. What one of a finite set makes is kept below ``shared``, and
    so are the images of the estimate, for other calls that would make the same; results are the same with and without.

    Raises:
        ZsqError: before work starts, if the recipe, the model, the data or the folder cannot be used.
    """
    recipe = resolve(method, preset=preset, effort=effort, protocol=protocol, overrides=overrides)
    if synthesizer is not None:
        recipe = replace(recipe, synthesizer=synthesizer)
    bits = Bits.parse(bits)
    network = _network(model, checkpoint=checkpoint, input_shape=input_shape, mean=mean, std=std)
    run = Run(out, seed=seed, device=device, precision=precision, reporter=reporter)
    teacher = Teacher(network.module)
    images = _images(data, network)
    digest = teacher.digest()
    with run.timed("capture"):
        student = capture(teacher.module.to(run.device), torch.zeros(2, *network.input_shape, device=run.device))
    job = Job(teacher, student, bits, run, network.input_shape, pixel_box(network))
    check(recipe, job)
    _check_shares(recipe, run)
    _lay_out(run.layout, teacher.module, student)
    identity = {"method": recipe.name, "bits": str(bits), "seed": str(seed), "teacher": digest, "recipe": show(recipe)}
    if precision != "float32":
        identity["precision"] = precision
    run.claim(identity)
    run.write("recipe", f"{recipe.name} {bits}, seed {seed}\n\n{show(recipe)}\n".encode())

    def place(images: object) -> Path | None:
        return None if shared is None else Path(shared) / images_key(images, digest, network, run)

    source = Source(recipe.synthesizer, job)
    finite = reads_images(recipe) and not source.live
    if finite:
        with run.timed("synthesize"), run.sharing(place(recipe.synthesizer)):
            source.take(None)
    for step in recipe.quantizer:
        with run.timed(_stage(step)):
            step.apply(job, source)
    freeze(student)
    student.eval().requires_grad_(False)
    _lay_out(torch.contiguous_format, teacher.module, student)  # what is measured is what a file gives back
    made = source.take(None if finite else SHOWN) if reads_images(recipe) else None
    saved = save_student(student, {"teacher": digest, "method": recipe.name, "bits": str(bits)})
    run.write("student.safetensors", saved)
    metrics: dict[str, Any] = {
        "model": _origin(model, network),
        "method": recipe.name,
        "bits": str(bits),
        "protocol": protocol_of(recipe).name,
        "effort": effort,
        "preset": preset,
        "seed": seed,
        "precision": precision,
        "overrides": {key: str(value) for key, value in (overrides or {}).items()},
        "teacher": digest,
        "checkpoint": None if checkpoint is None else str(Path(checkpoint).resolve()),
        "input_shape": list(network.input_shape),
        "mean": list(network.mean),
        "std": list(network.std),
        "float_tensors": float_tensors(student),
        "untraced": dict(student.meta.get("untraced", {})),
        "bytes": {"float": _float_bytes(teacher.module), "packed": len(saved)},
        "images": 0 if made is None else len(made),
        "peak_memory_mb": _peak_memory_mb(),  # before anything is measured
    }
    if estimate and job.classes > 1:
        sources = (smoke_sources if effort == "smoke" else image_sources)(job)
        with run.timed("estimate"):
            metrics["estimate"] = asdict(estimate_drop(job, sources, place(sources)))
    if images is not None:
        with run.timed("evaluate"):
            metrics["accuracy"] = _accuracies(network, teacher, student, images, run)
    metrics["seconds"] = {stage: round(seconds, 2) for stage, seconds in run.seconds.items()}
    metrics["versions"] = {"zsq": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if made is not None and run.folder is not None:
        _write_images(run, made, network)
    run.write("metrics.json", json.dumps(metrics, indent=1).encode())
    return Result(student, recipe, metrics, made, run.folder)


def synthesize(
    model: str | nn.Module | Network,
    method: str | Method = "zeroq",
    samples: int = 256,
    *,
    preset: str = "paper",
    effort: Effort = "paper",
    overrides: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    input_shape: tuple[int, int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    seed: int = 0,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> tuple[Batch, Network]:
    """``samples`` images that ``method`` makes for ``model``, in normalised space, and the network they are for.

    A generator that learns beside a student learns for as long here, beside the student as it starts.

    Raises:
        RecipeError: if the method makes no images.
    """
    if samples < 1:
        raise RecipeError(f"samples must be at least 1, got {samples}")
    recipe = resolve(method, preset=preset, effort=effort, overrides=overrides)
    if isinstance(recipe.synthesizer, NoData):
        making = [name for name, each in METHODS.items() if not isinstance(each.synthesizer, NoData)]
        raise RecipeError(f"{recipe.name} makes no images; methods that do: {', '.join(making)}")
    if not recipe.synthesizer.live:
        recipe = recipe.override({"synthesizer.samples": samples})
    network = _network(model, checkpoint=checkpoint, input_shape=input_shape, mean=mean, std=std)
    run = Run(seed=seed, device=device, reporter=reporter)
    teacher = Teacher(network.module)
    teacher.module.to(run.device)
    student = capture(teacher.module, torch.zeros(2, *network.input_shape, device=run.device))
    job = Job(teacher, student, Bits(), run, network.input_shape, pixel_box(network))
    check(replace(recipe, quantizer=()), job)  # only the images are made
    source = Source(recipe.synthesizer, job)
    if source.live:
        for step in run.steps(_learning_steps(recipe), "synthesize"):
            source.batch(step, 1)
    return source.take(samples), network


def load(folder: str | Path, model: str | nn.Module | Network | None = None) -> tuple[fx.GraphModule, Network]:
    """The student that a run left in ``folder``, and its network; ``model`` is needed if it was handed in as a module.

    Outputs are equal to those of the run to the bit. Loading executes no code from the folder.

    Raises:
        RunError: if the folder holds no finished run.
        UnsupportedModel: if ``model`` is not the network that was quantized.
    """
    metrics = read_metrics(folder)
    settings = {
        "input_shape": tuple(metrics["input_shape"]),
        "mean": tuple(metrics["mean"]),
        "std": tuple(metrics["std"]),
    }
    if model is None:
        model = str(metrics["model"])
        if ":" not in model:
            raise RunError(f"{folder} was made from a module in memory ({model}): hand it in as the model")
    network = _network(model, checkpoint=metrics["checkpoint"], **settings)
    if Teacher(network.module).digest() != metrics["teacher"]:
        raise UnsupportedModel(f"{folder} was made from other weights than this {network.name} has")
    student, _ = load_student(
        Path(folder) / "student.safetensors", network.module, torch.zeros(2, *network.input_shape)
    )
    return student, network


def plan_export(
    folder: str | Path, target: str | Target = "ort-x86", model: str | nn.Module | Network | None = None
) -> Plan:
    """What the student of the run in ``folder`` will be on ``target``; ``write`` of it makes the file.

    ``model`` is needed if it was handed in as a module.

    Raises:
        ZsqError: as ``load`` says, or if the packages for the target are missing, or it cannot hold the student.
    """
    target = find_target(target)
    student, network = load(folder, model)
    return plan(student, network.input_shape, target, _about(read_metrics(folder)))


def read_metrics(folder: str | Path) -> dict[str, Any]:
    """What a finished run measured.

    Raises:
        RunError: if the folder holds no finished run.
    """
    path = Path(folder) / "metrics.json"
    try:
        metrics: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{folder} holds no finished run ({path.name}: {error}): run zsq quantize --out first"
        ) from error
    return metrics


def resolve(
    method: str | Method,
    *,
    preset: str = "paper",
    effort: Effort = "paper",
    protocol: str | QuantizationProtocol | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Method:
    """The recipe that will run: the method, its preset, the effort, the protocol and single values, in this order.

    A protocol may bring passes of its own, which ``zsq.quant.recipes`` lists.

    Raises:
        RecipeError: if a name or path does not exist, or a value does not fit; the message lists what exists.
    """
    recipe = (find_method(method) if isinstance(method, str) else method).preset(preset)
    if effort not in ("smoke", "fast", "paper"):
        raise RecipeError(f"effort is smoke, fast or paper, got {effort!r}")
    if effort == "fast" and preset != "fast":
        recipe = recipe.preset("fast")
    if protocol is not None:
        recipe = under(recipe, find_protocol(protocol))
    if effort == "smoke":
        recipe = smoke(recipe)
    return recipe.override(overrides or {})


def find_method(name: str) -> Method:
    """The method or control called ``name``; ``plugin+host`` is a plug-in on a host.

    Raises:
        RecipeError: if there is none; the message lists those that exist.
    """
    known = {**METHODS, **BASELINES}
    plugin, plus, host = name.partition("+")
    if plus:
        if plugin not in PLUGINS:
            raise RecipeError(f"{plugin!r} takes no host: plug-ins are {', '.join(PLUGINS)}")
        return PLUGINS[plugin](find_method(host))
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise RecipeError(f"no method {name!r}{hint}: there is {', '.join(known)}")
    return known[name]


def find_protocol(protocol: str | QuantizationProtocol) -> QuantizationProtocol:
    """The protocol called ``protocol``.

    Raises:
        RecipeError: if there is none; the message lists those that exist.
    """
    if isinstance(protocol, QuantizationProtocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise RecipeError(f"no protocol {protocol!r}: there is {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]


def pixel_box(network: Network) -> tuple[tuple[float, float], ...]:
    """The least and the largest value of a normalised pixel in each channel."""
    return tuple(((0 - mean) / std, (1 - mean) / std) for mean, std in zip(network.mean, network.std, strict=True))


def to_pixels(images: Tensor, network: Network) -> Tensor:
    """Normalised images (N, C, H, W) as (N, H, W, C) uint8, clipped to what a screen can show."""
    centre, spread = (torch.tensor(values).view(-1, 1, 1) for values in (network.mean, network.std))
    shown = (images.cpu() * spread + centre).clamp(0, 1) * 255
    return shown.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _network(model: str | nn.Module | Network, **settings: Any) -> Network:
    return model if isinstance(model, Network) else load_network(model, **settings)


def _origin(model: str | nn.Module | Network, network: Network) -> str:
    """What names the network from any folder, or only its own name for a module in memory."""
    if not isinstance(model, str):
        return network.name
    place, _, factory = model.rpartition(":")
    return f"{Path(place).resolve()}:{factory}" if place.endswith(".py") else model


def _about(metrics: dict[str, Any]) -> dict[str, str]:
    """What an exported file says of itself, each value as text or JSON."""
    model = str(metrics["model"])
    place, _, name = model.partition(":")
    labels = entry(name).class_names if place == "zoo" else None
    facts = {key: metrics[key] for key in ("model", "method", "bits", "protocol", "seed", "teacher")}
    facts |= {key: metrics[key] for key in ("input_shape", "mean", "std", "versions")}
    facts |= {} if labels is None else {"labels": labels}
    return {f"zsq.{key}": each if isinstance(each, str) else json.dumps(each) for key, each in facts.items()}


def check(recipe: Method, job: Job) -> None:
    """Return if ``recipe`` can work on the network of ``job``.

    Raises:
        UnsupportedModel: if it cannot; the message says which methods can.
        RecipeError: if a pass draws more images than are made, or its own check fails.
    """
    shown = job.teacher.offers | ALWAYS - ({"labels"} if job.classes < 2 else set())
    try:
        recipe.check(job.teacher)
        if not needs(recipe) <= shown:
            raise UnsupportedModel(f"{recipe.name} makes images for classes, and this network has 1 logit")
    except UnsupportedModel as error:
        fitting = [name for name, each in METHODS.items() if needs(each) <= shown]
        raise UnsupportedModel(f"{error}; methods that fit: {', '.join(fitting) or 'none yet'}") from None


def _lay_out(layout: torch.memory_format, *networks: nn.Module) -> None:
    """Move the 4-d parameters and buffers of ``networks`` into ``layout``, in place."""
    for network in networks:
        # torch's overloads of Module.to do not list memory_format, which it takes.
        network.to(memory_format=layout)  # type: ignore[call-overload]


def _check_shares(recipe: Method, run: Run) -> None:
    for step in recipe.quantizer:
        if isinstance(step, Distill):
            run.share(getattr(recipe.synthesizer if recipe.synthesizer.live else step, "batch_size", 0))
            if step.student_bn == "train" and run.world > 1:
                raise RecipeError(
                    f"student_bn='train' takes the statistics of a whole batch, and each of {run.world} processes "
                    "sees its share: choose 'eval', or one process"
                )


def _images(data: str | Path | Images | None, network: Network) -> Images | None:
    if data is None:
        return None
    images = data if isinstance(data, Images) else read_images(data, network.input_shape)
    check_images(images, network.classes)
    return images


def _learning_steps(recipe: Method) -> int:
    """How many batches the passes of ``recipe`` draw from its live synthesizer."""
    drawing = [step for step in recipe.quantizer if not getattr(step, "images", None)]
    return sum(int(getattr(step, "steps", 0)) for step in drawing if getattr(step, "reads_images", False))


def images_key(recipe: object, teacher: str, network: Network, run: Run) -> str:
    """A SHA-256 of all that decides which images ``recipe`` makes, a finite set: where it agrees, they are the same."""
    facts = (recipe, teacher, network.input_shape, network.mean, network.std, run.seed, run.precision, run.device.type)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def reads_images(recipe: Method) -> bool:
    """Whether a pass of ``recipe`` looks at what its synthesizer makes."""
    return any(getattr(step, "reads_images", False) for step in recipe.quantizer)


def protocol_of(recipe: Method) -> QuantizationProtocol:
    """Where the quantizers of ``recipe`` sit."""
    return next(step.protocol for step in recipe.quantizer if isinstance(step, InsertFakeQuant))


def _stage(step: object) -> str:
    return snake(type(step).__name__)


def _accuracies(network: Network, teacher: Teacher, student: nn.Module, images: Images, run: Run) -> dict[str, Any]:
    settings: dict[str, Any] = {"mean": network.mean, "std": network.std, "device": str(run.device)}
    exact, low = evaluate_pair(teacher.module, student, images, **settings)
    return {"float": asdict(exact), "quantized": asdict(low), "drop": round(exact.top1 - low.top1, 4)}


def _float_bytes(network: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()) if t.dim() > 0)


def _peak_memory_mb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)


def _write_images(run: Run, made: Batch, network: Network) -> None:
    from PIL import Image

    tensors = {"images": made.images.cpu().contiguous()}
    for name, tensor in (("labels", made.labels), ("tokens", made.tokens)):
        if tensor is not None:
            tensors[name] = tensor.cpu().contiguous()
    run.write("images.safetensors", safetensors.torch.save(tensors))
    shown = to_pixels(made.images[:64], network)
    columns = min(8, len(shown))
    rows = -(-len(shown) // columns)
    height, width, channels = shown.shape[1:]
    sheet = torch.full((rows * (height + 1), columns * (width + 1), channels), 255, dtype=torch.uint8)
    for index, image in enumerate(shown):
        y, x = index // columns * (height + 1), index % columns * (width + 1)
        sheet[y : y + height, x : x + width] = image
    array = sheet.numpy()
    buffer = io.BytesIO()
    picture = Image.fromarray(array[:, :, 0] if channels == 1 else array[:, :, :3])
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(buffer, "PNG")
    run.write("images.png", buffer.getvalue())
