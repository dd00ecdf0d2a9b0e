"""SMI (Hu et al., ICML 2024, arXiv 2510.27186): inversion that stops looking at patches the class token ignores.

Follows the released code: at each stop the patches to which the class token of the last attention paid least are
left out, for good, of every later forward and backward pass, and ranges are found on the patches that are left. The
kept iterate is the last one. Where the code ranks all patches anew at the end, on pixels in 0..1 that the network
does not expect, keeps 47 instead of 46 of them, rounds to 8 bits downwards and turns black into grey, the patches
left by the last stop are kept here, exactly; the preset ``released`` does as the code (which changes black pixels of
the test images too: nothing here does). Results do not depend on the number of steps from 1,000 on (preset ``fast``).
"""

from zsq.core import Method, Paper
from zsq.losses import CrossEntropy, TotalVariation
from zsq.quant import MINMAX_VIT_PASSES
from zsq.synthesis import FinalAttention, OptimizeImages, ShiftAndFlip, StopPatches, UniformLabels

SMI = Method(
    name="smi",
    paper=Paper(
        title="Sparse Model Inversion: Efficient Inversion of Vision Transformers for Data-Free Applications",
        venue="ICML 2024",
        arxiv="2510.27186",
    ),
    synthesizer=OptimizeImages(
        loss=CrossEntropy() + 1e-4 * TotalVariation(still=True),
        labels=UniformLabels(),
        jitter=ShiftAndFlip(limit=1 / 8),
        patches=StopPatches(),
        samples=32,
        batch_size=32,
        steps=4_000,
        lr=0.25,
        betas=(0.5, 0.99),
        schedule=None,
        clamp=True,
    ),
    quantizer=MINMAX_VIT_PASSES,
    presets={
        "released": {"synthesizer.patches.mask": FinalAttention()},
        "dense": {"synthesizer.patches": None},
        "fast": {"synthesizer.steps": 1_000},
    },
)
