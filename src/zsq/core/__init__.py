"""The words of the library."""

from zsq.core.attention import Attention
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
from zsq.core.loss import Loss, Objective, Total, start
from zsq.core.method import ALWAYS, FLOAT, Bits, Job, Method, NoData, Paper, Pass, Synthesizer, Transform, smoke
from zsq.core.recipe import Recipe, check_counts, check_positive, diff, needs, show, walk
from zsq.core.run import Precision, Reporter, Run
from zsq.core.schedule import MultiStep
from zsq.core.source import Batch, Source
from zsq.core.teacher import Landmarks, Teacher, View, look

__all__ = [
    "ALWAYS",
    "FLOAT",
    "Attention",
    "BNInput",
    "Batch",
    "Bits",
    "CheckpointError",
    "DataError",
    "Job",
    "Landmarks",
    "Loss",
    "Method",
    "MissingExtra",
    "MissingView",
    "MultiStep",
    "NoData",
    "Objective",
    "Paper",
    "Pass",
    "Precision",
    "Recipe",
    "RecipeError",
    "Reporter",
    "Run",
    "RunError",
    "Source",
    "Synthesizer",
    "Teacher",
    "Total",
    "Transform",
    "UnsupportedModel",
    "View",
    "ZsqError",
    "channel_sums",
    "check_counts",
    "check_positive",
    "diff",
    "look",
    "needs",
    "show",
    "smoke",
    "start",
    "walk",
]
