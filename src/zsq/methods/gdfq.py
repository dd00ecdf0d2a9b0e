"""GDFQ (Xu et al., ECCV 2020, arXiv 2003.03603): a class-conditional generator that learns beside the student.

Follows the released code where the paper is silent: variances, averaged over channels and layers; a KL divergence
divided by the number of classes too; every layer at the same bits, and activations quantized behind ReLU only.
Corrected here: the moving average of ranges is not fed its own correction (preset ``released``), and the last step is
kept, not the best on test data. The paper's setting for ImageNet is the default, that for 32 pixels the preset
``cifar``; ``fast`` takes 1,200 steps of 32 images at ten times its learning rate.
"""

from zsq.core import Method, MultiStep, Paper
from zsq.losses import BNStatistics, CrossEntropy, Distillation, StudentCrossEntropy
from zsq.quant import QAT_LOWBIT_ALL, Distill, InsertFakeQuant, TrackRanges, WarmUp
from zsq.synthesis import ConditionalTrunk, ConvTrunk, LabelTimesNoise, PlainNoise, TrainGenerator

BATCH_STATISTICS = BNStatistics(over="batch", spread="var", unbiased=False, channels="mean", layers="mean")
"""What the family matches in place of ZeroQ's statistics."""

SMALL = {
    "synthesizer.trunk": ConvTrunk(),
    "synthesizer.batch_size": 200,
    "quantizer.track_ranges.batch_size": 200,
    "quantizer.warm_up.steps": 0,
    "quantizer.distill.lr": 1e-4,
    "quantizer.distill.schedule.at": (19_200, 39_200, 59_200),
    "quantizer.distill.steps": 79_200,
}
"""The settings for 32 pixels."""

SMALL_FAST = {
    **SMALL,
    "synthesizer.batch_size": 32,
    "synthesizer.schedule.at": (),
    "quantizer.track_ranges.steps": 200,
    "quantizer.track_ranges.batch_size": 4,
    "quantizer.warm_up.steps": 200,
    "quantizer.distill.lr": 1e-3,
    "quantizer.distill.schedule.at": (600,),
    "quantizer.distill.steps": 800,
}
"""Minutes on two cores."""

WARM_UP_GENERATOR = {
    "quantizer.track_ranges.images": TrainGenerator(loss=CrossEntropy() + 0.1 * BATCH_STATISTICS, batch_size=16),
    "quantizer.track_ranges.average.correction": "fed back",
}
"""How the codes that grew from GDFQ's find ranges, though they train on other images."""

GDFQ = Method(
    name="gdfq",
    paper=Paper(title="Generative Low-bitwidth Data Free Quantization", venue="ECCV 2020", arxiv="2003.03603"),
    synthesizer=TrainGenerator(
        loss=CrossEntropy() + 0.1 * BATCH_STATISTICS,
        latents=PlainNoise(),
        trunk=ConditionalTrunk(),
        batch_size=16,
        schedule=MultiStep(at=(20_000, 40_000, 60_000)),
    ),
    quantizer=(
        InsertFakeQuant(protocol=QAT_LOWBIT_ALL, follow=True),
        TrackRanges(steps=800),  # 4 epochs of 200: ranges move, then freeze
        WarmUp(steps=9_200),  # 50 epochs in all before the student learns
        Distill(
            loss=Distillation(reduction="mean") + StudentCrossEntropy(),
            lr=1e-6,
            schedule=MultiStep(at=(10_000, 30_000, 50_000)),  # epochs 100, 200 and 300
            steps=70_000,
        ),
    ),
    presets={
        "cifar": {**SMALL, "synthesizer.latents": LabelTimesNoise()},
        "released": {"quantizer.track_ranges.average.correction": "fed back"},
        "fast": {**SMALL_FAST, "synthesizer.latents": LabelTimesNoise()},
    },
)
