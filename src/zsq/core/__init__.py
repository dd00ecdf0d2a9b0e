"""The words of the library."""

from zsq.core.bn import BNInput, channel_sums
from zsq.core.errors import (
    CheckpointError,
    DataError,
    MissingExtra,
    MissingView,
    RecipeError,
    RunError,
    UnsupportedModel,
    ZsqError,
)
from zsq.core.loss import Loss, Objective, start
from zsq.core.method import FLOAT, Bits, Job, Method, NoData, Paper, Pass, Synthesizer, smoke
from zsq.core.recipe import Recipe, check_counts, check_positive, diff, needs, show, walk
from zsq.core.run import Reporter, Run
from zsq.core.source import Batch, Source
from zsq.core.teacher import Teacher, View

__all__ = [
    "FLOAT",
    "BNInput",
    "Batch",
    "Bits",
    "CheckpointError",
    "DataError",
    "Job",
    "Loss",
    "Method",
    "MissingExtra",
    "MissingView",
    "NoData",
    "Objective",
    "Paper",
    "Pass",
    "Recipe",
    "RecipeError",
    "Reporter",
    "Run",
    "RunError",
    "Source",
    "Synthesizer",
    "Teacher",
    "UnsupportedModel",
    "View",
    "ZsqError",
    "channel_sums",
    "check_counts",
    "check_positive",
    "diff",
    "needs",
    "show",
    "smoke",
    "start",
    "walk",
]
