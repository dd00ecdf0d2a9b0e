"""SynQ (Kim et al., ICLR 2025, arXiv 2603.18423): fine-tuning that allows for what is wrong with synthetic images.

``synq+HOST`` takes the host's images; HAST's where none is named (the paper adds TexQ's calibration centres to them).
High frequencies are damped, class activation maps of both networks aligned, and labels learned for easy images only.
Follows the paper's objective with HAST's perturbation; the paper searches its weights by test accuracy, so that the
ones of the shipped ImageNet script stand here. The released code keeps HAST's feature alignment:
preset ``released``, with the ranges of a generator. Two of its mistakes have no switch: the zero image that its CAM
object shows to the range trackers, and hooks that pile up. The cutoff is relative to the side of the image.
"""

from dataclasses import replace

from zsq.core import Method, NoData, Paper, RecipeError
from zsq.losses import BranchEnergies, CamAlignment, Distillation, EasyLabels, StudentCrossEntropy
from zsq.methods.gdfq import WARM_UP_GENERATOR
from zsq.methods.hast import HAST
from zsq.quant import Perturbed
from zsq.synthesis import CropAndFlip, LowPass, Noise

LOSS = 20 * Distillation() + 0.5 * StudentCrossEntropy()


def synq(host: Method = HAST) -> Method:
    """The images of ``host``, and SynQ's fine-tuning on them.

    Raises:
        RecipeError: if ``host`` makes no images.
    """
    if isinstance(host.synthesizer, NoData | Noise):
        raise RecipeError(f"synq fine-tunes on synthetic images, and {host.name} makes none")
    tuning = HAST.override(
        {
            "quantizer.distill.loss": LOSS,
            "quantizer.distill.transforms": (CropAndFlip(scale=0.5), LowPass()),
            "quantizer.distill.labels": EasyLabels(threshold=0.5),
            "quantizer.distill.gradient": Perturbed(epsilon=0.01, beside=50 * CamAlignment()),
        }
    )
    return replace(
        tuning,
        name="synq" if host is HAST else f"synq+{host.name}",
        paper=Paper(
            title="SynQ: Accurate Zero-shot Quantization by Synthesis-aware Fine-tuning",
            venue="ICLR 2025",
            arxiv="2603.18423",
        ),
        synthesizer=host.synthesizer,
        presets={name: _preset(name, host) for name in dict.fromkeys((*HAST.presets, *host.presets))},
    )


def _preset(name: str, host: Method) -> dict[str, object]:
    """The host's part that is about images, and HAST's part that is about training."""
    images = {path: value for path, value in host.presets.get(name, {}).items() if path.startswith("synthesizer")}
    training = {
        path: value
        for path, value in HAST.presets.get(name, {}).items()
        if path.startswith("quantizer") and ".branch_energies" not in path
    }
    released = {
        **WARM_UP_GENERATOR,
        "quantizer.distill.loss": LOSS + 1_000 * BranchEnergies(),  # at the moved images too: its ImageNet setting
    }
    return {**images, **training, **(released if name == "released" else {})}


SYNQ = synq()
