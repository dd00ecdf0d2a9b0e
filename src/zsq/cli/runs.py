"""The main job: quantize a network, make a method's images, measure either."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsq.cli.options import (
    DATA_HELP,
    AsJson,
    Checkpoint,
    Device,
    EffortName,
    InputShape,
    Mean,
    MethodName,
    Model,
    PrecisionName,
    Preset,
    Seed,
    Settings,
    Std,
    Threads,
    read_network,
    read_overrides,
    use_threads,
)
from zsq.cli.text import aligned, print_json, progress_on_terminal

if TYPE_CHECKING:
    from zsq.core import Batch
    from zsq.evaluate import Accuracy
    from zsq.nets.load import Network


def quantize(
    model: Model,
    method: MethodName,
    bits: Annotated[str, typer.Option(help="Of weights and activations: w4a4; 2 to 8, or 32 for float.")],
    out: Annotated[Path, typer.Option(help="The run folder; the same command continues an interrupted run.")],
    preset: Preset = "paper",
    protocol: Annotated[str | None, typer.Option(help="Where quantizers sit; the method's own by default.")] = None,
    effort: EffortName = "paper",
    settings: Settings = None,
    checkpoint: Checkpoint = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    estimate: Annotated[
        bool, typer.Option(help="Estimate the loss from synthetic images, which needs no data.")
    ] = True,
    seed: Seed = 0,
    device: Device = "auto",
    precision: PrecisionName = "float32",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Make a low-bit copy of a network, no data.

    With --data, report what it cost. The run folder holds the recipe, the student, the log and the metrics.
    """
    overrides, network = read_overrides(settings), read_network(checkpoint, input_shape, mean, std)
    from zsq.api import quantize

    use_threads(threads)
    with progress_on_terminal() as reporter:
        result = quantize(
            model,
            method,
            bits,
            preset=preset,
            protocol=protocol,
            effort=effort,
            overrides=overrides,
            data=data,
            estimate=estimate,
            out=out,
            seed=seed,
            device=device,
            precision=precision,
            reporter=reporter,
            **network,
        )
    if as_json:
        print_json({**result.metrics, "folder": str(out)})
    else:
        print("\n".join(aligned(_summary(result.metrics, out))))


def synthesize(
    model: Model,
    method: MethodName,
    samples: Annotated[int, typer.Option(min=1, help="How many images.")],
    out: Annotated[Path, typer.Option(help="An .npz with x (N, H, W, C) uint8, and y; or a new folder of PNGs.")],
    preset: Preset = "paper",
    effort: EffortName = "paper",
    settings: Settings = None,
    checkpoint: Checkpoint = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Make and keep a method's images."""
    overrides, network = read_overrides(settings), read_network(checkpoint, input_shape, mean, std)
    if out.suffix not in ("", ".npz"):
        raise typer.BadParameter(f"--out {out}: give a name that ends in .npz, or one without suffix for a folder")
    if out.suffix == "" and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise typer.BadParameter(f"--out {out} exists: choose another folder")
    from zsq.api import synthesize

    use_threads(threads)
    with progress_on_terminal() as reporter:
        made, found = synthesize(
            model,
            method,
            samples,
            preset=preset,
            effort=effort,
            overrides=overrides,
            seed=seed,
            device=device,
            reporter=reporter,
            **network,
        )
    _write_images(made, found, out)
    facts = {"model": model, "method": method, "samples": len(made), "seed": seed, "out": str(out)}
    if as_json:
        print_json(facts)
    else:
        print("\n".join(aligned([[key, str(value)] for key, value in facts.items()])))


def evaluate(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, or a network.", show_default=False)],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    checkpoint: Checkpoint = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure a network or a run on images.

    For a run folder, the low-bit network is measured beside its teacher.
    """
    settings = read_network(checkpoint, input_shape, mean, std)
    is_run = Path(model).is_dir()
    if is_run and any(value is not None for value in settings.values()):
        raise typer.BadParameter(f"{model} is a run folder, which knows its network: leave its settings away")
    from dataclasses import asdict

    from zsq.api import load
    from zsq.core.run import resolve_device
    from zsq.evaluate import check_images, evaluate, evaluate_pair, read_images
    from zsq.nets.load import load_network

    use_threads(threads)
    student, network = load(model) if is_run else (None, load_network(model, **settings))
    images = read_images(data, network.input_shape)
    check_images(images, network.classes)

    with progress_on_terminal() as reporter:
        measured: dict[str, Any] = {"mean": network.mean, "std": network.std, "device": resolve_device(device)}
        if reporter is not None:
            measured["progress"] = partial(reporter.progress, "evaluate")
        low: Accuracy | None = None
        if student is None:
            exact = evaluate(network.module, images, **measured)
        else:
            exact, low = evaluate_pair(network.module, student, images, **measured)
    facts: dict[str, Any] = {"model": model, "images": exact.images, "float": asdict(exact)}
    rows = [["model", model], ["images", str(exact.images)]]
    if low is None:
        rows += [["top-1", f"{exact.top1:.2f} %"], ["top-5", f"{exact.top5:.2f} %"]]
    else:
        facts |= {"quantized": asdict(low), "drop": round(exact.top1 - low.top1, 4)}
        rows += _accuracy_rows(facts)
    if as_json:
        print_json(facts)
    else:
        print("\n".join(aligned(rows)))


def _summary(metrics: dict[str, Any], out: Path) -> list[list[str]]:
    """The facts of a finished run as rows of a table."""
    rows = [[name, str(metrics[name])] for name in ("model", "method", "bits", "protocol", "effort", "seed")]
    if metrics["preset"] != "paper":
        rows.append(["preset", metrics["preset"]])
    if metrics["precision"] != "float32":
        rows.append(["precision", metrics["precision"]])
    rows += [["set", f"{path}={value}"] for path, value in metrics["overrides"].items()]
    rows += _accuracy_rows(metrics["accuracy"]) if "accuracy" in metrics else [["accuracy", "not measured: no --data"]]
    rows += _estimate_rows(metrics) if "estimate" in metrics else []
    left, size, seconds = metrics["float_tensors"], metrics["bytes"], metrics["seconds"]
    names = f" ({', '.join(left)})" if 0 < len(left) <= 6 else ""
    rows.append(["left in float", f"{len(left)} tensors{names}"])
    rows += [["untraced", f"{name}: {reason}"] for name, reason in metrics["untraced"].items()]
    ratio = size["float"] / size["packed"]
    rows.append(["bytes", f"{size['float']:,} -> {size['packed']:,} ({ratio:.2f}x smaller)"])
    stages = ", ".join(f"{stage} {spent:.1f}" for stage, spent in seconds.items())
    rows.append(["seconds", f"{sum(seconds.values()):.1f} ({stages})"])
    rows.append(["peak memory", f"{metrics['peak_memory_mb']:,} MB"])
    return [*rows, ["run folder", str(out)]]


def _accuracy_rows(accuracy: dict[str, Any]) -> list[list[str]]:
    exact, low = accuracy["float"], accuracy["quantized"]
    return [
        ["float", f"top-1 {exact['top1']:.2f} %, top-5 {exact['top5']:.2f} %"],
        ["quantized", f"top-1 {low['top1']:.2f} %, top-5 {low['top5']:.2f} %"],
        ["drop", f"{accuracy['drop']:.2f} points"],
        ["agreement", f"{low['agreement']:.2f} % of {low['images']} images"],
    ]


def _estimate_rows(metrics: dict[str, Any]) -> list[list[str]]:
    from zsq.estimate import in_words

    sources = metrics["estimate"]["sources"].items()
    counted = [f"{each['agreement']:.1f} % of {each['images']} {name}" for name, each in sources]
    return [["estimate", in_words(metrics)], ["", f"agrees with the teacher on {', '.join(counted)}"]]


def _write_images(made: "Batch", network: "Network", out: Path) -> None:
    """An ``.npz`` with ``x``, ``mean``, ``std`` and, for labelled images, ``y``; or PNGs.

    PNGs lie in one folder a class if they have labels.
    """
    import io

    import numpy as np
    from PIL import Image

    from zsq.api import to_pixels
    from zsq.core.run import save_atomically

    pixels = to_pixels(made.images, network).numpy()  # (N, H, W, C)
    labels = None if made.labels is None else made.labels.cpu().numpy()
    if out.suffix == ".npz":
        arrays: dict[str, np.ndarray[Any, Any]] = {"x": pixels} if labels is None else {"x": pixels, "y": labels}
        arrays |= {"mean": np.array(network.mean), "std": np.array(network.std)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        save_atomically(out, buffer.getvalue())
        return
    for index, image in enumerate(pixels):
        buffer = io.BytesIO()
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
        folder = out if labels is None else out / f"{labels[index]:04d}"
        save_atomically(folder / f"{index:06d}.png", buffer.getvalue())
