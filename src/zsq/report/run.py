"""What the page of a run shows."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.api import load, read_metrics, to_pixels
from zsq.core import Teacher
from zsq.estimate import in_words
from zsq.layers import Layer, Layers, held_out, inspect_layers
from zsq.losses.statistics import moments
from zsq.nets.load import Network
from zsq.report import charts
from zsq.zoo import entry

__all__ = ["bn_match", "curves", "run_facts"]

_SHOWN = 64
"""Images that are shown, at most."""
_SIDE = 112
"""Pixels of a shown image, at most."""
_NAMED = 3
"""Layers that are said to hurt most."""


def run_facts(folder: Path, model: str | nn.Module | Network | None) -> dict[str, Any]:
    """What the template of a run is filled with.

    Raises:
        ZsqError: as ``zsq.load`` says.
    """
    metrics = read_metrics(folder)
    student, network = load(folder, model)
    layers = inspect_layers(student, network, held_out(network, student, metrics["seed"]))
    made = _made(folder)
    return {
        "title": f"{network.name}, {metrics['method']} {metrics['bits']}",
        "metrics": metrics,
        "estimate": _estimate(metrics),
        "layers": layers,
        "rows": [_row(layer) for layer in layers.layers],
        "worst": [layer.name for layer in layers.worst[:_NAMED]],
        "layer_charts": _layer_charts(layers),
        "images": [] if made is None else _pictures(made, network, metrics["model"]),
        "curves": curves(folder),
        "bn": [] if made is None else _bn_charts(made["images"], network),
        "recipe": (folder / "recipe").read_text() if (folder / "recipe").exists() else "",
        "seconds": sum(metrics["seconds"].values()),
    }


def curves(folder: Path) -> list[tuple[str, str]]:
    """A chart, with its name, for each kind of label in the log; labels of one kind that were seen once share bars."""
    path = folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    seen: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        if isinstance(line.get("loss"), int | float):
            seen.setdefault(line["label"], []).append((line["step"], line["loss"]))
    found = []
    for label, points in seen.items():
        if len(points) > 1:
            chart = charts.lines({label: _stretches(points)}, f"loss of {label}", x_name="step", y_name="loss")
            found.append((label, chart))
    once: dict[str, list[tuple[str, float]]] = {}
    for label, points in seen.items():
        if len(points) == 1:
            kind, _, name = label.partition(" ")
            once.setdefault(kind, []).append((name or kind, points[0][1]))
    for kind, ends in once.items():
        found.append((f"{kind}, at the end", charts.bars(ends, f"last loss of {kind}", log=True, axis="in order")))
    return found


def _stretches(points: list[tuple[int, float]]) -> list[list[tuple[float, float]]]:
    """The points, parted wherever the steps start anew."""
    parts: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if parts[-1] and step <= parts[-1][-1][0]:
            parts.append([])
        parts[-1].append((step, value))
    return parts


def bn_match(images: Tensor, network: Network) -> list[tuple[float, float]]:
    """For each BatchNorm layer, how far ``images`` (N, C, H, W) are from what it recorded, in its standard deviations.

    First the distance of the means, then that of the standard deviations: root mean squares over the channels.
    """
    found = []
    with torch.no_grad():
        for layer in Teacher(network.module).view(images, frozenset({"bn"})).bn:
            mean, var = moments(layer.x, "batch")
            unit = (layer.var + 1e-12).sqrt()
            gaps = (mean[0] - layer.mean) / unit, (var[0].sqrt() - unit) / unit
            found.append((float(gaps[0].square().mean().sqrt()), float(gaps[1].square().mean().sqrt())))
    return found


def _bn_charts(images: Tensor, network: Network) -> list[tuple[str, str]]:
    if "bn" not in Teacher(network.module).offers:
        return []
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    own, other = bn_match(images, network), bn_match(noise, network)
    found = []
    for index, name in enumerate(("mean", "standard deviation")):
        series = {
            "these images": [[(place + 1.0, each[index]) for place, each in enumerate(own)]],
            "Gaussian noise": [[(place + 1.0, each[index]) for place, each in enumerate(other)]],
        }
        label = f"distance of the {name} from the recorded one, by layer"
        found.append((name, charts.lines(series, label, x_name="BatchNorm layer", y_name="recorded deviations")))
    return found


def _estimate(metrics: dict[str, Any]) -> dict[str, Any] | None:
    if "estimate" not in metrics:
        return None
    found = metrics["estimate"]
    end = max(found["high"], found["drop"], 5.0) * 1.1
    return {"words": in_words(metrics), "chart": charts.interval(found["drop"], found["low"], found["high"], end)}


def _layer_charts(layers: Layers) -> list[tuple[str, str, str]]:
    """Heading, chart and what it says."""
    worst = [layer.name for layer in layers.worst[:_NAMED]]
    noise = [(layer.name, layer.snr) for layer in layers.layers if layer.snr < 200]
    found = []
    if noise:
        about = "Signal to noise of what each layer puts out, behind all layers before it. Higher is better."
        chart = charts.bars(noise, "signal to noise by layer", unit=" dB", marked=worst)
        found.append(("Noise", chart, about))
    alone = [(layer.name, layer.kl) for layer in layers.layers if layer.kl]
    if alone:
        about = (
            "The teacher with one layer quantized at a time: how far its answers move, as Kullback-Leibler divergence "
            "in nats, on a logarithmic scale. Lower is better."
        )
        chart = charts.bars(alone, "divergence where one layer is quantized", log=True, marked=worst)
        found.append(("Sensitivity", chart, about))
    return found


def _row(layer: Layer) -> dict[str, Any]:
    return {
        "layer": layer,
        "weights": charts.histogram(
            layer.weights, f"weights of {layer.name}, {layer.weights.low:.3g} to {layer.weights.high:.3g}"
        ),
        "inputs": charts.histogram(
            layer.inputs, f"input of {layer.name}, {layer.inputs.low:.3g} to {layer.inputs.high:.3g}", layer.input_range
        ),
    }


def _made(folder: Path) -> dict[str, Tensor] | None:
    path = folder / "images.safetensors"
    if not path.exists():
        return None
    return {name: tensor[:_SHOWN] for name, tensor in safetensors.torch.load_file(path).items()}


def _pictures(made: dict[str, Tensor], network: Network, model: str) -> list[dict[str, Any]]:
    """Each image as a data URI, with the class it was made for and what the teacher believes."""
    with torch.no_grad():
        shares = F.softmax(network.module(made["images"]), 1)
    confidence, first = shares.max(1)
    place, _, name = model.partition(":")
    names = entry(name).class_names if place == "zoo" else None
    labels = made.get("labels")

    def said(index: int) -> str:
        return names[index] if names else str(index)

    found = []
    for index, pixels in enumerate(to_pixels(made["images"], network)):
        label = None if labels is None or labels.dim() > 1 else int(labels[index])
        found.append(
            {
                "uri": _uri(pixels),
                "label": None if label is None else said(label),
                "class": said(int(first[index])),
                "confidence": 100 * float(confidence[index]),
                "right": label is None or label == int(first[index]),
            }
        )
    return found


def _uri(pixels: Tensor) -> str:
    """An image (H, W, C) as a data URI: small ones as they are, larger ones as a small JPEG."""
    array = pixels.numpy()
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array[:, :, :3])
    buffer, kind = io.BytesIO(), "png"
    if max(picture.size) > _SIDE:
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        kind = "jpeg"
    picture.save(buffer, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
