"""Ways to make a network low-bit."""

from zsq.quant.grid import (
    OMSE,
    Grid,
    LpError,
    MinMax,
    Percentile,
    PercentileSearch,
    PerChannel,
    PerTensor,
    Range,
    RangeAverage,
    Scheme,
)
from zsq.quant.layers import Calibrate, FoldBatchNorm, InsertFakeQuant
from zsq.quant.moments import BNRanges
from zsq.quant.nonuniform import Log2, LogSqrt2, PowerOfTwoFactors, TwinGELU, TwinSoftmax
from zsq.quant.placement import (
    DEPLOY_VIT,
    MINMAX_PTQ,
    MINMAX_VIT,
    PROTOCOLS,
    PTQ_8BIT_ENDS,
    QAT_LOWBIT_ALL,
    REPQ_VIT,
    SIMULATE_ALL,
    AfterActivations,
    Ends,
    EveryEdge,
    LayerInputs,
    QuantizationProtocol,
)
from zsq.quant.recipes import MINMAX_VIT_PASSES, REPQ_VIT_PASSES, under
from zsq.quant.reconstruct import ReconstructBlocks
from zsq.quant.reparameterize import Reparameterize
from zsq.quant.ridge import RidgeCorrection
from zsq.quant.rounding import AdaRound, Constant, Nearest
from zsq.quant.search import SearchRanges
from zsq.quant.train import Distill, Nesterov, Once, Perturbed, TrackRanges, WarmUp
from zsq.quant.transfer import AbsorbBiases, CorrectBiases, EqualizeLayers

__all__ = [
    "DEPLOY_VIT",
    "MINMAX_PTQ",
    "MINMAX_VIT",
    "MINMAX_VIT_PASSES",
    "OMSE",
    "PROTOCOLS",
    "PTQ_8BIT_ENDS",
    "QAT_LOWBIT_ALL",
    "REPQ_VIT",
    "REPQ_VIT_PASSES",
    "SIMULATE_ALL",
    "AbsorbBiases",
    "AdaRound",
    "AfterActivations",
    "BNRanges",
    "Calibrate",
    "Constant",
    "CorrectBiases",
    "Distill",
    "Ends",
    "EqualizeLayers",
    "EveryEdge",
    "FoldBatchNorm",
    "Grid",
    "InsertFakeQuant",
    "LayerInputs",
    "Log2",
    "LogSqrt2",
    "LpError",
    "MinMax",
    "Nearest",
    "Nesterov",
    "Once",
    "PerChannel",
    "PerTensor",
    "Percentile",
    "PercentileSearch",
    "Perturbed",
    "PowerOfTwoFactors",
    "QuantizationProtocol",
    "Range",
    "RangeAverage",
    "ReconstructBlocks",
    "Reparameterize",
    "RidgeCorrection",
    "Scheme",
    "SearchRanges",
    "TrackRanges",
    "TwinGELU",
    "TwinSoftmax",
    "WarmUp",
    "under",
]
