"""What a student lost, without a label: how often it agrees with its teacher on images that no method saw.

A student that answers as its teacher does is as accurate. How often it does on real images is not known; on images
made for this purpose it can be counted, and where they differ, times a constant, is the estimate. ``docs/estimate.md``
says where the constants come from, how far the estimate was off, and where it fails.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.core import Job, Run, Source, UnsupportedModel, smoke
from zsq.losses import BNStatistics
from zsq.synthesis import DeadLeaves, Noise, OptimizeImages, ReachMargins

__all__ = [
    "RANGE",
    "Agreement",
    "Estimate",
    "ImageSource",
    "agreement",
    "estimate_drop",
    "image_sources",
    "in_words",
    "smoke_sources",
    "wilson",
]

RANGE = 20.0
"""Points up to which the estimate was found to be right."""
_BATCH = 64
_SURE = 1.645
"""Standard deviations of a 90 % interval."""


@dataclass(frozen=True)
class ImageSource:
    """A way to make images for an estimate."""

    synthesizer: Noise | ReachMargins
    points: float
    """Points of accuracy for a point of weighted disagreement, as fitted on the networks of ``docs/estimate.md``."""


def image_sources(job: Job) -> dict[str, ImageSource]:
    """The sources for the teacher of ``job``, the one that decides first; no method makes their images.

    Images of classes are near to a decision or far from it, as photographs are; where BatchNorm has statistics, these
    pull them nearer to photographs before. Dead leaves are as they fall, and all there is for a network that passes no
    gradient back.
    """
    fallen = {"dead leaves": ImageSource(Noise(pixels=DeadLeaves(), samples=256), points=0.21)}
    if not _passes_gradients(job):
        return fallen
    leaves = Noise(pixels=DeadLeaves(), samples=192)
    familiar = OptimizeImages(
        loss=BNStatistics(over="batch", channels="mean", layers="mean"),
        pixels=DeadLeaves(),
        samples=192,
        batch_size=64,
        steps=4,
        lr=0.04,
        schedule=None,
        clamp=True,
    )
    bn = "bn" in job.teacher.offers
    images = ImageSource(ReachMargins(start=familiar if bn else leaves), points=0.36 if bn else 0.43)
    return {"class images": images, **fallen}


def smoke_sources(job: Job) -> dict[str, ImageSource]:
    """The least that still runs each line: for tests."""
    return {name: replace(each, synthesizer=smoke(each.synthesizer)) for name, each in image_sources(job).items()}


def _passes_gradients(job: Job) -> bool:
    """Whether logits depend on pixels as far as torch knows: some functions have no derivative."""
    pixels = torch.zeros(1, *job.input_shape, device=job.run.device, requires_grad=True)
    return job.teacher.view(pixels).logits.requires_grad


@dataclass(frozen=True)
class Agreement:
    """How alike two networks answer to one set of images; shares in percent."""

    agreement: float
    """Images with the same first class."""
    weighted_agreement: float
    """The same, where an image counts as much as the teacher is confident."""
    expected_drop: float
    """Points of top-1 that the student is behind if labels are drawn from what the teacher believes."""
    distance: float
    """Half the sum of absolute differences of the two softmaxes (total variation), the mean over images."""
    confidence: float
    """The largest share of the teacher's softmax, the mean over images."""
    images: int


@dataclass(frozen=True)
class Estimate:
    """What a student is believed to have lost, in points of top-1 accuracy."""

    drop: float
    low: float
    high: float
    sources: Mapping[str, Agreement]


def estimate_drop(job: Job, sources: Mapping[str, ImageSource] | None = None, shared: Path | None = None) -> Estimate:
    """What ``job.student`` lost against ``job.teacher``, from images made for this alone; nothing of the job changes.

    The drop is ``points`` times the weighted disagreement on the first source; ``image_sources`` says which there are
    by default. The interval reaches from the lowest to the highest that any of them allows in the 90 % interval of what
    it counted. Images are kept in the folder ``shared`` for other students of the same teacher and seed.

    Raises:
        UnsupportedModel: if the networks have one logit, on which all agree.
    """
    if job.classes < 2:
        raise UnsupportedModel("agreement says nothing about a network with 1 logit")
    run = Run(seed=job.run.seed, device=str(job.run.device))  # draws and keeps nothing in the run of the student
    apart = Job(job.teacher, job.student, job.bits, run, job.input_shape, job.pixel_box)
    found, ends = {}, []
    sources = image_sources(job) if sources is None else sources
    for name, images in sources.items():
        source = Source(images.synthesizer, apart, f"estimate/{name}")
        with run.sharing(shared):
            source.take(None)
        teacher, student = _logits(apart, source)
        found[name] = agreement(teacher, student)
        shares = wilson(1 - found[name].weighted_agreement / 100, _effective(teacher))
        ends += [100 * images.points * share for share in shares]
    first = next(iter(sources))
    drop = sources[first].points * (100 - found[first].weighted_agreement)
    return Estimate(round(drop, 3), round(min(ends), 3), round(max(ends), 3), found)


def in_words(metrics: Mapping[str, Any]) -> str:
    """What the estimate in ``metrics`` allows to be said.

    >>> in_words({"estimate": {"drop": 1.234, "low": 0.5, "high": 2.0}, "input_shape": [3, 32, 32]})
    'a drop of 1.2 points (0.5 to 2.0), without data'
    >>> in_words({"estimate": {"drop": 27.0, "low": 22.0, "high": 31.0}, "input_shape": [3, 32, 32]})
    'a drop of more than 20 points, without data'
    """
    found = metrics["estimate"]
    points = f"{found['drop']:.1f} points ({found['low']:.1f} to {found['high']:.1f})"
    size = points if found["drop"] <= RANGE else f"more than {RANGE:.0f} points"
    doubt = "" if metrics["input_shape"][0] == 3 else ": a guess, tested on colour photographs alone"
    return f"a drop of {size}, without data{doubt}"


def agreement(teacher: Tensor, student: Tensor) -> Agreement:
    """How alike the logits (N, K) of the two are."""
    p, q = F.softmax(teacher.double(), 1), F.softmax(student.double(), 1)
    confidence, first = p.max(1)
    second = student.argmax(1)
    same = (first == second).double()
    return Agreement(
        agreement=_percent(same.mean()),
        weighted_agreement=_percent((confidence * same).sum() / confidence.sum()),
        expected_drop=_percent((confidence - p.gather(1, second[:, None])[:, 0]).mean()),
        distance=_percent((p - q).abs().sum(1).mean() / 2),
        confidence=_percent(confidence.mean()),
        images=len(teacher),
    )


def wilson(share: float, count: float, deviations: float = _SURE) -> tuple[float, float]:
    """Wilson's interval for a ``share`` in 0..1 that was counted in ``count`` images.

    >>> [round(end, 3) for end in wilson(0.5, 100)]
    [0.419, 0.581]
    """
    spread = deviations**2 / count
    centre = share + spread / 2
    reach = math.sqrt(spread * share * (1 - share) + spread**2 / 4)
    return max(0.0, (centre - reach) / (1 + spread)), min(1.0, (centre + reach) / (1 + spread))


def _effective(teacher: Tensor) -> float:
    """How many images of equal weight say as much as these, weighted by confidence (Kish)."""
    weights = F.softmax(teacher.double(), 1).amax(1)
    return float(weights.sum() ** 2 / weights.square().sum())


def _percent(share: Tensor) -> float:
    return round(100 * float(share), 3)


@torch.no_grad()
def _logits(job: Job, source: Source) -> tuple[Tensor, Tensor]:
    """What teacher and student say (N, K) to all images of ``source``, clipped to what an image file can hold."""
    low, high = torch.tensor(job.pixel_box, device=job.run.device).T[:, None, :, None, None]
    batches = [batch.images.clamp(low, high) for batch in source.batches(_BATCH)]
    networks: tuple[nn.Module, ...] = (job.teacher.module, job.student)
    teacher, student = (torch.cat([network(images) for images in batches]).cpu() for network in networks)
    return teacher, student
