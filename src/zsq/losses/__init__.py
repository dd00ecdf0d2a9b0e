"""Equations shared by two or more papers."""

from zsq.losses.distillation import BranchEnergies, CamAlignment, Distillation
from zsq.losses.features import CentreDistance
from zsq.losses.labels import CrossEntropy, EasyLabels, HardCrossEntropy, StudentCrossEntropy
from zsq.losses.patches import PatchSimilarityEntropy
from zsq.losses.priors import TotalVariation
from zsq.losses.statistics import BNStatistics, ImageStatistics

__all__ = [
    "BNStatistics",
    "BranchEnergies",
    "CamAlignment",
    "CentreDistance",
    "CrossEntropy",
    "Distillation",
    "EasyLabels",
    "HardCrossEntropy",
    "ImageStatistics",
    "PatchSimilarityEntropy",
    "StudentCrossEntropy",
    "TotalVariation",
]
