"""Ways to make a network low-bit."""

from zsq.quant.grid import LpError, MinMax, Percentile, PerChannel, PerTensor, Range, RangeAverage, Scheme
from zsq.quant.layers import Calibrate, FoldBatchNorm, InsertFakeQuant
from zsq.quant.moments import BNRanges
from zsq.quant.placement import (
    MINMAX_PTQ,
    PROTOCOLS,
    PTQ_8BIT_ENDS,
    QAT_LOWBIT_ALL,
    SIMULATE_ALL,
    AfterActivations,
    Ends,
    EveryEdge,
    LayerInputs,
    QuantizationProtocol,
)
from zsq.quant.reconstruct import ReconstructBlocks
from zsq.quant.rounding import AdaRound, Constant, Nearest
from zsq.quant.train import Distill, Nesterov, Once, Perturbed, TrackRanges, WarmUp
from zsq.quant.transfer import AbsorbBiases, CorrectBiases, EqualizeLayers

__all__ = [
    "MINMAX_PTQ",
    "PROTOCOLS",
    "PTQ_8BIT_ENDS",
    "QAT_LOWBIT_ALL",
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
    "InsertFakeQuant",
    "LayerInputs",
    "LpError",
    "MinMax",
    "Nearest",
    "Nesterov",
    "Once",
    "PerChannel",
    "PerTensor",
    "Percentile",
    "Perturbed",
    "QuantizationProtocol",
    "Range",
    "RangeAverage",
    "ReconstructBlocks",
    "Scheme",
    "TrackRanges",
    "WarmUp",
]
