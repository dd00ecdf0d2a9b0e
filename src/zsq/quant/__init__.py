"""Ways to make a network low-bit."""

from zsq.quant.grid import LpError, MinMax, Percentile, PerChannel, PerTensor, Range, Scheme
from zsq.quant.layers import Calibrate, FoldBatchNorm, InsertFakeQuant
from zsq.quant.moments import BNRanges
from zsq.quant.placement import (
    MINMAX_PTQ,
    PROTOCOLS,
    PTQ_8BIT_ENDS,
    SIMULATE_ALL,
    AfterActivations,
    Ends,
    EveryEdge,
    LayerInputs,
    QuantizationProtocol,
)
from zsq.quant.reconstruct import ReconstructBlocks
from zsq.quant.rounding import AdaRound, Constant, Nearest
from zsq.quant.transfer import AbsorbBiases, CorrectBiases, EqualizeLayers

__all__ = [
    "MINMAX_PTQ",
    "PROTOCOLS",
    "PTQ_8BIT_ENDS",
    "SIMULATE_ALL",
    "AbsorbBiases",
    "AdaRound",
    "AfterActivations",
    "BNRanges",
    "Calibrate",
    "Constant",
    "CorrectBiases",
    "Ends",
    "EqualizeLayers",
    "EveryEdge",
    "FoldBatchNorm",
    "InsertFakeQuant",
    "LayerInputs",
    "LpError",
    "MinMax",
    "Nearest",
    "PerChannel",
    "PerTensor",
    "Percentile",
    "QuantizationProtocol",
    "Range",
    "ReconstructBlocks",
    "Scheme",
]
