"""Which layers of a student hurt, and by how much: noise, sensitivity and ranges of each, without data."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from zsq.api import load, pixel_box, read_metrics
from zsq.core import Bits, Job, RecipeError, Run, Source, Teacher
from zsq.estimate import image_sources
from zsq.nets.graph import capture
from zsq.nets.load import Network
from zsq.quant.layers import complete, edge_of, fold, layers_in_order
from zsq.quant.placement import moved_to
from zsq.quant.quantizers import (
    ActivationQuantizer,
    WeightQuantizer,
    activation_quantizers,
    float_weight,
    weight_quantizers,
)
from zsq.runtime.adapters import images_of
from zsq.synthesis import ReachMargins

__all__ = ["Histogram", "Layer", "Layers", "Sums", "held_out", "inspect_layers", "layers_of"]

Chosen = Literal["own", "held-out"]
IMAGES = 64
"""Looked at, at most: each layer costs one forward pass of all."""
_BINS = 48
_EQUAL = 200.0
"""Decibels that stand for no difference."""


@dataclass(frozen=True)
class Histogram:
    """How often values occur in equal bins from ``low`` to ``high``."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a student beside the teacher's."""

    name: str
    kind: str
    weight_bits: int | None
    """None where the weight is float."""
    input_bits: int | None
    """Of what the layer reads; None where that is float."""
    snr: float
    """Signal to noise of the output behind all layers before, in decibels; 200 where there is no noise."""
    kl: float | None
    """Divergence from the teacher's answers where this layer alone is quantized, the mean in nats."""
    agreement: float | None
    """How often the answers' first class is the teacher's where this layer alone is quantized, in percent."""
    weight_snr: float | None
    """Signal to noise of the weight, in decibels."""
    weights: Histogram
    """Of the teacher."""
    inputs: Histogram
    """What the teacher's layer reads."""
    input_range: tuple[float, float] | None
    """What the quantizer of the input represents."""
    clipped: float | None
    """Values of the teacher's input beyond that range, in percent."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """All layers in the order in which they run, and the student as a whole, on the same images."""

    images: int
    source: str
    """Which: ``own`` or ``held-out``."""
    aligned: bool
    """Whether a method moved scales between channels: outputs are compared channel by channel up to scale and offset,
    and no layer can be quantized alone."""
    snr: float
    """Of the logits."""
    kl: float
    agreement: float
    layers: tuple[Layer, ...]

    @property
    def worst(self) -> tuple[Layer, ...]:
        """The layers from the one that hurts most: by divergence alone, or by noise where that is not known."""
        return tuple(sorted(self.layers, key=lambda layer: layer.snr if layer.kl is None else -layer.kl))


def layers_of(
    folder: str | Path, images: Chosen = "held-out", model: str | nn.Module | Network | None = None
) -> Layers:
    """The layers of the run in ``folder``, on images that no method makes, or on the run's own.

    Raises:
        RecipeError: if ``images`` is neither.
        DataError: if the run has no images of its own.
        ZsqError: as ``zsq.load`` says.
    """
    if images not in get_args(Chosen):
        raise RecipeError(f"images are {' or '.join(get_args(Chosen))}, got {images!r}")
    student, network = load(folder, model)
    if images == "own":
        return inspect_layers(student, network, torch.from_numpy(images_of(folder))[:IMAGES], images)
    return inspect_layers(student, network, held_out(network, student, read_metrics(folder)["seed"]))


def held_out(network: Network, student: fx.GraphModule, seed: int = 0) -> Tensor:
    """Images (N, C, H, W) for ``network`` that no method makes: those by which the loss is estimated."""
    teacher = Teacher(network.module)
    job = Job(teacher, student, Bits(), Run(seed=seed, device="cpu"), network.input_shape, pixel_box(network))
    first = next(iter(image_sources(job).values())).synthesizer
    path = "start.samples" if isinstance(first, ReachMargins) else "samples"
    return Source(first.override({path: IMAGES}), job, "layers").take(None).images


@torch.no_grad()
def inspect_layers(student: fx.GraphModule, network: Network, images: Tensor, source: str = "held-out") -> Layers:
    """Each layer of ``student`` beside the one of ``network``, on ``images`` (N, C, H, W) in normalised space."""
    teacher = _reference(student, network)
    names = list(layers_in_order(student))
    alone = _Alone(student, teacher)
    sums, inputs = {name: Sums() for name in names}, {name: _Counter() for name in names}
    exact, low = [], []
    for batch in images.split(16):
        logits, seen, read = _watch(teacher, names, batch)
        for name, value in read.items():
            inputs[name].add(value, alone.inputs(name))
        exact.append(logits)
        logits, found, _ = _watch(student, names, batch)
        for name, value in found.items():
            sums[name].add(seen[name], value)
        low.append(logits)
    answers = torch.cat(exact)
    aligned = alone.rescaled
    layers = []
    for name in names:
        kl, agreement = (None, None) if aligned else _compare(answers, alone.answers(name, images))
        layers.append(_layer(name, teacher, alone, sums[name], inputs[name], aligned, kl, agreement))
    whole = Sums()
    whole.add(answers, torch.cat(low))
    kl, agreement = _compare(answers, torch.cat(low))
    return Layers(
        images=len(images),
        source=source,
        aligned=aligned,
        snr=whole.snr(),
        kl=kl,
        agreement=agreement,
        layers=tuple(layers),
    )


class Sums:
    """What is to be known of pairs of tensors for their signal-to-noise ratio: sums for each channel, in float64."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, signal: Tensor, found: Tensor) -> None:
        """Count in the values of ``signal`` and ``found``: (N, C, H, W), or channels last."""
        rows = [(x.movedim(1, -1) if x.dim() == 4 else x).flatten(0, -2).double() for x in (signal, found)]
        s, f = rows
        sums = torch.stack([torch.full_like(s[0], len(s)), s.sum(0), f.sum(0), (s * s).sum(0), (f * f).sum(0)])
        sums = torch.cat([sums, (s * f).sum(0)[None], (f - s).square().sum(0)[None]])  # (7, C)
        self._sums = sums if self._sums is None else self._sums + sums

    def snr(self, aligned: bool = False) -> float:
        """Power of the signal over that of the difference, in decibels between -200 and 200.

        ``aligned`` compares each channel with the line a x + b that fits it best: signal is what varies on the line,
        noise what is left.
        """
        if self._sums is None:  # the layer did not run
            return _EQUAL
        count, s, f, ss, ff, sf, noise = self._sums
        power = ss
        if aligned:
            spread_s, spread_f = ss - s * s / count, ff - f * f / count
            power = (sf - s * f / count).square() / spread_s.clamp(min=1e-300)
            noise = (spread_f - power).clamp(min=0)
        return decibels(float(power.sum()), float(noise.sum()))


def decibels(power: float, noise: float) -> float:
    """``10 log10(power / noise)`` between -200 and 200, rounded to a hundredth; -200 where either is no number.

    >>> decibels(100.0, 1.0), decibels(1.0, 0.0)
    (20.0, 200.0)
    """
    if not (math.isfinite(power) and math.isfinite(noise)):
        return -_EQUAL
    if noise <= power * 10 ** (-_EQUAL / 10):
        return _EQUAL
    return round(max(-_EQUAL, 10 * math.log10(max(power, 1e-300) / noise)), 2)


class _Counter:
    """A histogram that grows by batches: its ends are the first batch's, and what lies beyond counts at them."""

    def __init__(self) -> None:
        self._low = self._high = 0.0
        self._counts = torch.zeros(_BINS)
        self._seen = self._beyond = 0

    def add(self, x: Tensor, quantizer: ActivationQuantizer | None) -> None:
        x = x.detach().float()
        if not self._seen:
            self._low, self._high = float(x.min()), float(x.max())
        self._counts += torch.histc(x.clamp(self._low, self._high), _BINS, self._low, self._high)
        self._seen += x.numel()
        if quantizer is not None and quantizer.ready:
            low, high = represented(quantizer)
            self._beyond += int(((x < low) | (x > high)).sum())

    def histogram(self) -> Histogram:
        return Histogram(self._low, self._high, tuple(int(count) for count in self._counts))

    def clipped(self) -> float:
        return round(100 * self._beyond / max(self._seen, 1), 3)


def represented(quantizer: ActivationQuantizer) -> tuple[float, float]:
    """The least and the largest value that ``quantizer`` can put out, give or take half a step."""
    half = float(quantizer.scale.abs().max()) / 2
    low, high = quantizer.scheme.ends(quantizer.grid)
    return float(low.min()) - half, float(high.max()) + half


class _Alone:
    """A copy of a student that computes as the teacher does, but for one layer at a time."""

    def __init__(self, student: fx.GraphModule, teacher: fx.GraphModule) -> None:
        self._network = copy.deepcopy(student)
        self._student = student
        self._weights = {name: quantizer for name, (_, quantizer) in weight_quantizers(self._network).items()}
        self._inputs = _read_by(self._network)
        self.rescaled = _rescaled(student, teacher)
        every: list[WeightQuantizer | ActivationQuantizer] = [*self._weights.values()]
        for quantizer in [*every, *activation_quantizers(self._network).values()]:
            quantizer.enabled = False
        own = teacher.state_dict()
        for name, tensor in self._network.state_dict().items():
            plain = name.replace(".parametrizations.weight.original", ".weight")
            if plain in own:
                tensor.copy_(own[plain])

    def inputs(self, name: str) -> ActivationQuantizer | None:
        """What quantizes the input of the layer ``name``."""
        return self._inputs.get(name)

    def weight(self, name: str) -> WeightQuantizer | None:
        """What quantizes the weight of the layer ``name``."""
        return self._weights.get(name)

    def answers(self, name: str, images: Tensor) -> Tensor:
        """Logits (N, K) of the teacher with the student's layer ``name``."""
        with self._only(name):
            return torch.cat([self._network(batch) for batch in images.split(16)])

    @contextlib.contextmanager
    def _only(self, name: str) -> Iterator[None]:
        quantizers = [each for each in (self.weight(name), self.inputs(name)) if each is not None]
        layer, learned = self._network.get_submodule(name), self._student.get_submodule(name)
        own, new = layer.bias, learned.bias
        teachers = own.clone() if isinstance(own, Tensor) else None
        for quantizer in quantizers:
            quantizer.enabled = True
        if isinstance(own, Tensor) and isinstance(new, Tensor):
            own.copy_(new)
        try:
            yield
        finally:
            for quantizer in quantizers:
                quantizer.enabled = False
            if isinstance(own, Tensor) and teachers is not None:
                own.copy_(teachers)


def _reference(student: fx.GraphModule, network: Network) -> fx.GraphModule:
    """The teacher as a graph with the layers of ``student``: BatchNorm folded or not."""
    teacher = capture(network.module, torch.zeros(2, *network.input_shape))
    for edit in student.meta.get("edits", []):
        if edit[0] == "fold":
            fold(teacher)
        elif edit[0] == "complete":
            complete(teacher, edit[1])
    return teacher.eval().requires_grad_(False)


def _rescaled(student: fx.GraphModule, teacher: fx.GraphModule) -> bool:
    """Whether a layer of ``student`` computes in other units than the teacher's: scales moved across activations."""
    if any(edit[0] == "equivariant" for edit in student.meta.get("edits", [])):
        return True
    pairs = ((m, teacher.get_submodule(n)) for n, m in student.named_modules() if isinstance(m, nn.LayerNorm))
    return any(_moved(own.weight, other.weight) for own, other in pairs if own.weight is not None)


def _moved(scale: Tensor, before: Tensor | object) -> bool:
    return isinstance(before, Tensor) and bool(((scale / before).abs().log2().abs() > 1).any())


def _read_by(graph: fx.GraphModule) -> dict[str, ActivationQuantizer]:
    """The quantizer of what each layer reads."""
    found: dict[str, ActivationQuantizer] = {}
    for name, quantizer in activation_quantizers(graph).items():
        edge = edge_of(graph, name)
        if edge is None:
            found[name.rpartition(".")[0]] = quantizer
        else:
            found.update({str(end.target): quantizer for reader in edge.readers for end in moved_to(reader)})
    return found


def _watch(
    graph: fx.GraphModule, names: list[str], batch: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The logits, and what each layer puts out and reads."""
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, read: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name], inputs[name] = output.clone(), read[0].clone()

        return hook

    hooks = [graph.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        logits: Tensor = graph(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, outputs, inputs


def _compare(teacher: Tensor, student: Tensor) -> tuple[float, float]:
    """Divergence of the answers (N, K) from the teacher's, and the percentage with the same first class."""
    p, q = F.log_softmax(teacher.double(), 1), F.log_softmax(student.double(), 1)
    kl = F.kl_div(q, p, reduction="batchmean", log_target=True)
    return round(max(float(kl), 0.0), 6), round(100 * float((p.argmax(1) == q.argmax(1)).double().mean()), 3)


def _layer(
    name: str,
    teacher: fx.GraphModule,
    alone: _Alone,
    sums: Sums,
    inputs: _Counter,
    aligned: bool,
    kl: float | None,
    agreement: float | None,
) -> Layer:
    layer = teacher.get_submodule(name)
    weight, quantizer, reading = float_weight(layer), alone.weight(name), alone.inputs(name)
    low, high = float(weight.min()), float(weight.max())
    counts = torch.histc(weight.float(), _BINS, low, high)
    noise = None
    if quantizer is not None and not aligned:
        quantized = _quantized(quantizer)
        noise = decibels(float(weight.square().sum()), float((quantized - weight).square().sum()))
    ready = reading is not None and reading.ready
    return Layer(
        name=name,
        kind=type(layer).__name__,
        weight_bits=None if quantizer is None else quantizer.bits,
        input_bits=reading.bits if reading is not None and ready else None,
        snr=sums.snr(aligned),
        kl=kl,
        agreement=agreement,
        weight_snr=noise,
        weights=Histogram(low, high, tuple(int(count) for count in counts)),
        inputs=inputs.histogram(),
        input_range=represented(reading) if reading is not None and ready else None,
        clipped=inputs.clipped() if ready else None,
    )


def _quantized(quantizer: WeightQuantizer) -> Tensor:
    """The weight that the integers of ``quantizer`` stand for."""
    assert quantizer.codes is not None
    return (quantizer.codes.to(quantizer.scale.dtype) + quantizer.low - quantizer.zero_point) * quantizer.scale
