"""HAST (Li et al., CVPR 2023, arXiv 2303.13826): images that are hard for the teacher, made harder for the student.

Against IntraQ: the label loss of an image is weighted by its difficulty; each distillation step also looks at the batch
moved against the student; and channel energies of residual branches are aligned instead of labels learned.
The released code overwrites lambda and epsilon of its configurations with 1000 and 0.01, and finds ranges on a
generator's images with a moving average that is fed its own correction: preset ``released``. Batches are the 16
(ImageNet) or 256 (CIFAR) that SynQ states as HAST's setting.
"""

from dataclasses import replace

from zsq.core import Paper
from zsq.losses import BranchEnergies, Distillation, HardCrossEntropy
from zsq.methods.gdfq import BATCH_STATISTICS, WARM_UP_GENERATOR
from zsq.methods.intraq import FAST, INTRAQ
from zsq.quant import Perturbed
from zsq.synthesis import CropAndFlip

CIFAR = {
    "synthesizer.loss.hard_cross_entropy.weight": 10.0,
    "synthesizer.loss.hard_cross_entropy.focus": 2.0,
    "synthesizer.jitter": None,
    "quantizer.distill.loss.branch_energies.weight": 1_000.0,
    "quantizer.distill.batch_size": 256,
    "quantizer.distill.lr": 1e-5,
    "quantizer.distill.schedule.at": (3_200, 7_200, 11_200),  # epochs 20, 40 and 60
}

HAST = replace(
    INTRAQ.override(
        {
            "synthesizer.loss": BATCH_STATISTICS + 0.1 * HardCrossEntropy(focus=0.5),
            "synthesizer.jitter": CropAndFlip(scale=0.4, probability=0.5),
            "quantizer.distill.loss": 20 * Distillation() + 4_000 * BranchEnergies(),
            "quantizer.distill.gradient": Perturbed(epsilon=0.01),
        }
    ),
    name="hast",
    paper=Paper(title="Hard Sample Matters a Lot in Zero-Shot Quantization", venue="CVPR 2023", arxiv="2303.13826"),
    presets={
        "cifar": CIFAR,
        "cifar100": {
            **CIFAR,
            "quantizer.distill.loss.branch_energies.weight": 2_000.0,
            "quantizer.distill.gradient.epsilon": 0.02,
        },
        "released": {**WARM_UP_GENERATOR, "quantizer.distill.loss.branch_energies.weight": 1_000.0},
        "fast": {**CIFAR, **FAST, "quantizer.distill.steps": 400, "quantizer.distill.schedule.at": (300,)},
    },
)
