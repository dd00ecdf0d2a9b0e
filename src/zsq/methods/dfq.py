"""DFQ (Nagel et al., ICCV 2019, arXiv 1906.04721): equalize, absorb, correct; per-tensor 8 bits without an image.

No code of the authors' paper exists; the constants are those on which their toolkit and the best-known
re-implementation agree. ReLU6 keeps an exact limit per channel (preset ``relu`` replaces it, as both codes do).
Biases stay float; the kept mean of a corrected layer stays where BatchNorm put it.
"""

from zsq.core import Method, Paper
from zsq.quant import (
    AbsorbBiases,
    BNRanges,
    CorrectBiases,
    EqualizeLayers,
    EveryEdge,
    InsertFakeQuant,
    PerTensor,
    QuantizationProtocol,
    Scheme,
)

PER_TENSOR_ALL = QuantizationProtocol(
    name="per-tensor-all", placement=EveryEdge(), weights=Scheme(granularity=PerTensor()), fold=True
)

DFQ = Method(
    name="dfq",
    paper=Paper(
        title="Data-Free Quantization Through Weight Equalization and Bias Correction",
        venue="ICCV 2019",
        arxiv="1906.04721",
    ),
    quantizer=(
        EqualizeLayers(),
        AbsorbBiases(sigmas=3.0),
        InsertFakeQuant(protocol=PER_TENSOR_ALL),
        CorrectBiases(),
        BNRanges(sigmas=6.0),
    ),
    presets={"fast": {}, "relu": {"quantizer.equalize_layers.exact_clip": False}},
)
