"""PSAQ-ViT (Li et al., ECCV 2022, arXiv 2203.02250): images whose patches differ as a photograph's do, then ranges.

Follows the released code: patches are compared by what they read in each attention, before heads are joined. It
always drops the first token, which in a Swin window is a patch; here only tokens that are no patches are dropped
(preset ``released`` drops the first everywhere). Its target of the total variation holds for 32 images of 224 pixels
and is scaled for others, as are its shifts of 15 and 30 pixels. Pixels are clamped by the network's own mean and
standard deviation. The quantizer of the images holds all that pixels can be, not only what was seen
(``protocol.pixels``). The preset ``swin`` has the learning rate of Swin.
"""

from zsq.core import Method, Paper
from zsq.losses import CrossEntropy, PatchSimilarityEntropy, TotalVariation
from zsq.quant import MINMAX_VIT_PASSES
from zsq.synthesis import InTurn, OptimizeImages, ShiftAndFlip, UniformLabels, WarmUpCosine

PSAQ_VIT = Method(
    name="psaq-vit",
    paper=Paper(
        title="Patch Similarity Aware Data-Free Quantization for Vision Transformers",
        venue="ECCV 2022",
        arxiv="2203.02250",
    ),
    synthesizer=OptimizeImages(
        loss=PatchSimilarityEntropy() + CrossEntropy() + 0.05 * TotalVariation(target=(2_500.0, 3_000.0)),
        labels=UniformLabels(),
        jitter=InTurn(
            first=ShiftAndFlip(limit=15 / 224, diagonal=True),
            second=ShiftAndFlip(limit=30 / 224, diagonal=True),
        ),
        samples=32,
        batch_size=32,
        steps=1_000,
        lr=0.2,
        betas=(0.5, 0.9),
        schedule=WarmUpCosine(rounds=2, warm_up=0.2),
        clamp=True,
    ),
    quantizer=MINMAX_VIT_PASSES,
    presets={
        "released": {"synthesizer.loss.patch_similarity_entropy.drop": 1},
        "swin": {"synthesizer.lr": 0.25},
        "fast": {"synthesizer.steps": 200},
    },
)
