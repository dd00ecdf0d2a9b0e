"""ZeroQ (Cai et al., CVPR 2020, arXiv 2001.00281): images that reproduce the BN statistics, then min-max ranges.

Follows the released code, with uniform bits (its mixed precision was never released): statistics are matched per
image, squares are summed over channels and layers, and quantizers sit after activations only. The pixels start as
integers uniform in 0..254, centred and divided by 5418.75 - their variance, where the comment in that code promises
variance 1 - so almost flat grey. BN inputs are hooked, not the first convolutions in order of registration.
The preset ``gaussian`` starts from unit normal pixels, as the paper is quoted.
"""

from zsq.core import Method, Paper
from zsq.losses import BNStatistics, ImageStatistics
from zsq.quant import MINMAX_PTQ, Calibrate, InsertFakeQuant
from zsq.synthesis import GaussianPixels, OptimizeImages, UniformPixels

ZEROQ = Method(
    name="zeroq",
    paper=Paper(title="ZeroQ: A Novel Zero Shot Quantization Framework", venue="CVPR 2020", arxiv="2001.00281"),
    synthesizer=OptimizeImages(
        loss=BNStatistics(over="image", spread="std") + ImageStatistics(),
        pixels=UniformPixels(low=-127.5 / 5418.75, high=127.5 / 5418.75),
        samples=64,
        batch_size=64,
        steps=500,
        lr=0.5,
    ),
    quantizer=(InsertFakeQuant(protocol=MINMAX_PTQ), Calibrate(samples=64, batch_size=64)),
    presets={"fast": {}, "gaussian": {"synthesizer.pixels": GaussianPixels()}},
)
