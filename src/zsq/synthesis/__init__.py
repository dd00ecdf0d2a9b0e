"""Ways to make images."""

from zsq.synthesis.generator import TrainGenerator
from zsq.synthesis.images import Noise, OptimizeImages, Plateau, WarmUpCosine
from zsq.synthesis.latents import Change, OptimizeLatents
from zsq.synthesis.networks import (
    ConditionalTrunk,
    ConvTrunk,
    LabelTimesNoise,
    PlainNoise,
    UpsampleGenerator,
)
from zsq.synthesis.sampling import (
    CropAndFlip,
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
    "GaussianPixels",
    "InTurn",
    "LabelTimesNoise",
    "LowPass",
    "Noise",
    "OptimizeImages",
    "OptimizeLatents",
    "PlainNoise",
    "Plateau",
    "ShiftAndFlip",
    "TrainGenerator",
    "UniformLabels",
    "UniformPixels",
    "UpsampleGenerator",
    "WarmUpCosine",
]
