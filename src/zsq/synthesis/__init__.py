"""Ways to make images."""

from zsq.synthesis.generator import TrainGenerator
from zsq.synthesis.images import Noise, OptimizeImages, Plateau, WarmUpCosine
from zsq.synthesis.latents import Change, OptimizeLatents
from zsq.synthesis.margins import ReachMargins
from zsq.synthesis.networks import (
    ConditionalTrunk,
    ConvTrunk,
    LabelTimesNoise,
    PlainNoise,
    UpsampleGenerator,
)
from zsq.synthesis.patches import FinalAttention, StopPatches
from zsq.synthesis.sampling import (
    CropAndFlip,
    DeadLeaves,
    GaussianPixels,
    InTurn,
    LowPass,
    ShiftAndFlip,
    UniformLabels,
    UniformPixels,
)

__all__ = [
    "Change",
    "ConditionalTrunk",
    "ConvTrunk",
    "CropAndFlip",
    "DeadLeaves",
    "FinalAttention",
    "GaussianPixels",
    "InTurn",
    "LabelTimesNoise",
    "LowPass",
    "Noise",
    "OptimizeImages",
    "OptimizeLatents",
    "PlainNoise",
    "Plateau",
    "ReachMargins",
    "ShiftAndFlip",
    "StopPatches",
    "TrainGenerator",
    "UniformLabels",
    "UniformPixels",
    "UpsampleGenerator",
    "WarmUpCosine",
]
