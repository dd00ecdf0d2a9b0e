"""Equations shared by two or more papers."""

from zsq.losses.labels import CrossEntropy
from zsq.losses.statistics import BNStatistics, ImageStatistics

__all__ = ["BNStatistics", "CrossEntropy", "ImageStatistics"]
