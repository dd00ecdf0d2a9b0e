"""IntraQ (Zhong et al., CVPR 2022, arXiv 2111.09136): images that differ within their class, then distillation.

The object is optimized at random scales and places (``CropAndFlip``), features stay in a ring around the centre of
their class, and the confidence asked for is drawn from a range. The margins for ImageNet are unverified, those of
``cifar`` and ``cifar100`` the released scripts'. Ranges are found on the images that are trained on; the released code
finds them on a GDFQ generator's (preset ``released``, with the margins of the released ImageNet script: crops alone).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zsq.core import Job, Loss, Method, MultiStep, Paper, RecipeError, View
from zsq.losses import CentreDistance, Distillation, StudentCrossEntropy
from zsq.methods.gdfq import BATCH_STATISTICS, WARM_UP_GENERATOR
from zsq.quant import QAT_LOWBIT_ALL, Distill, InsertFakeQuant, TrackRanges
from zsq.synthesis import CropAndFlip, OptimizeImages, Plateau, UniformLabels


@dataclass(frozen=True, kw_only=True)
class SoftInception(Loss):
    """Mean of (p_y - t)^2, p_y the teacher's probability of the label; t is 1 or, half of the time, U(``least``, 1).

    Targets are drawn once for each image. Only the label's entry counts, and a confidence above t is pushed down.
    """

    least: float = 0.9
    """Lower end of the confidences asked for; 1 asks for certainty always."""

    needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    def __post_init__(self) -> None:
        if not 0 <= self.least <= 1:
            raise RecipeError(f"least must lie in [0, 1], got {self.least}")

    def begin(self, job: Job) -> Callable[[View], Tensor]:
        """The term with the targets of one batch, drawn at the first look."""
        rng, targets = job.run.generator("confidence"), list[Tensor]()

        def term(view: View) -> Tensor:
            if not targets:
                coin, drawn = torch.rand(2, len(view.labels), generator=rng)
                targets.append(torch.where(coin < 0.5, self.least + (1 - self.least) * drawn, 1.0).to(view.logits))
            return self.distance(view, targets[0])

        return term

    def value(self, view: View) -> Tensor:
        """The term where certainty is asked for."""
        return self.distance(view, torch.ones_like(view.logits[:, 0]))

    def distance(self, view: View, targets: Tensor) -> Tensor:
        """The mean squared distance of the labels' probabilities from ``targets`` (N,)."""
        return (view.logits.softmax(1).gather(1, view.labels[:, None])[:, 0] - targets).square().mean()


def margins(least: float, lower: float, upper: float) -> dict[str, float]:
    """Overrides of the confidence asked for and of the ring."""
    ring = {"synthesizer.loss.centre_distance.lower": lower, "synthesizer.loss.centre_distance.upper": upper}
    return {"synthesizer.loss.soft_inception.least": least, **ring}


CIFAR = {
    **margins(least=0.95, lower=0.05, upper=0.8),
    "quantizer.distill.batch_size": 256,
    "quantizer.distill.lr": 1e-4,
    "quantizer.distill.schedule.at": (3_200, 7_200, 11_200),  # epochs 20, 40 and 60
}
FAST = {
    "synthesizer.samples": 512,
    "synthesizer.batch_size": 128,
    "synthesizer.steps": 200,
    "synthesizer.schedule.patience": 20,
    "quantizer.track_ranges.steps": 200,
    "quantizer.track_ranges.batch_size": 4,
    "quantizer.distill.batch_size": 64,
    "quantizer.distill.lr": 1e-5,  # at 1e-4 a batch this small diverges
    "quantizer.distill.schedule.at": (450,),
    "quantizer.distill.steps": 600,
}
"""Minutes on two cores, for networks of 32 pixels."""

INTRAQ = Method(
    name="intraq",
    paper=Paper(
        title="IntraQ: Learning Synthetic Images with Intra-Class Heterogeneity for Zero-Shot Network Quantization",
        venue="CVPR 2022",
        arxiv="2111.09136",
    ),
    synthesizer=OptimizeImages(
        loss=BATCH_STATISTICS + SoftInception() + CentreDistance(lower=0.3, upper=0.8),
        labels=UniformLabels(),
        jitter=CropAndFlip(scale=0.5, probability=0.5),
        samples=5_120,
        batch_size=256,
        steps=1_000,
        schedule=Plateau(patience=50),
    ),
    quantizer=(
        InsertFakeQuant(protocol=QAT_LOWBIT_ALL, follow=True),
        TrackRanges(steps=800),
        Distill(
            loss=20 * Distillation() + StudentCrossEntropy(),
            transforms=(CropAndFlip(scale=0.5),),
            lr=1e-6,
            schedule=MultiStep(at=(19_200,)),  # epoch 100
            steps=29_400,  # epochs 4 to 150
            batch_size=16,
        ),
    ),
    presets={
        "cifar": CIFAR,
        "cifar100": {**CIFAR, **margins(least=0.6, lower=0.02, upper=1.0)},
        "released": {**WARM_UP_GENERATOR, **margins(least=1.0, lower=0.0, upper=2.0)},
        "fast": {**CIFAR, **FAST},
    },
)
