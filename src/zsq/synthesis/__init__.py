"""Ways to make images."""

from zsq.synthesis.images import Noise, OptimizeImages, Plateau
from zsq.synthesis.latents import Change, OptimizeLatents
from zsq.synthesis.networks import UpsampleGenerator
from zsq.synthesis.sampling import GaussianPixels, ShiftAndFlip, UniformLabels, UniformPixels

__all__ = [
    "Change",
    "GaussianPixels",
    "Noise",
    "OptimizeImages",
    "OptimizeLatents",
    "Plateau",
    "ShiftAndFlip",
    "UniformLabels",
    "UniformPixels",
    "UpsampleGenerator",
]
