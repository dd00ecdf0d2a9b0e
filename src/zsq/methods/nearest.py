"""The control: weights rounded to nearest, activation ranges from Gaussian noise. What every paper must beat."""

from zsq.core import Method, Paper
from zsq.quant import MINMAX_PTQ, Calibrate, InsertFakeQuant
from zsq.synthesis import Noise

NEAREST = Method(
    name="nearest",
    paper=Paper(title="Round to nearest, ranges from Gaussian noise", venue="baseline"),
    synthesizer=Noise(samples=256),
    quantizer=(InsertFakeQuant(protocol=MINMAX_PTQ), Calibrate(samples=256, batch_size=256)),
    presets={"fast": {}},
)
