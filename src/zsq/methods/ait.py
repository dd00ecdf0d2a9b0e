"""AIT (Choi et al., CVPR 2022, arXiv 2203.17008): any host, distilled without labels and with inundated gradients.

``ait+HOST`` keeps the host's images; its generator keeps its own loss. Of the loss of its distillation the divergence
stays alone. The learning rate is 1e-4 unless a preset of the host says otherwise, and there is no weight decay.
Follows the released code: the update is scaled, not the gradient, and only up. Corrected here: an update that can
change no integer ends the search. The share is 1e-3 as at 32 pixels; the preset ``imagenet`` has 1e-4.
"""

from dataclasses import replace

from zsq.core import Method, Objective, Paper, RecipeError
from zsq.losses import Distillation
from zsq.methods.gdfq import GDFQ
from zsq.quant import Distill
from zsq.quant.inundation import Inundation

LABELLED = ("quantizer.distill.loss", "quantizer.distill.gradient.moved")
"""Where a preset of a host may bring back what is left out."""


def ait(host: Method = GDFQ) -> Method:
    """``host`` with nothing but the divergence left in its distillation, and updates that change integers.

    Raises:
        RecipeError: if ``host`` does not distill.
    """
    distill = next((step for step in host.quantizer if isinstance(step, Distill)), None)
    if distill is None:
        raise RecipeError(f"ait changes how a student is distilled, and {host.name} does not distill")
    terms = distill.loss.terms if isinstance(distill.loss, Objective) else (distill.loss,)
    changes = {
        "quantizer.distill.loss": Objective(terms=tuple(term for term in terms if isinstance(term, Distillation))),
        "quantizer.distill.optimizer": Inundation(),
        "quantizer.distill.lr": 1e-4,
    }
    kept = {
        name: {path: value for path, value in preset.items() if not path.startswith(LABELLED)}
        for name, preset in host.presets.items()
    }
    return replace(
        host.override(changes),
        name="ait" if host is GDFQ else f"ait+{host.name}",
        paper=Paper(
            title="It's All In the Teacher: Zero-Shot Quantization Brought Closer to the Teacher",
            venue="CVPR 2022",
            arxiv="2203.17008",
        ),
        presets={**kept, "imagenet": {"quantizer.distill.optimizer.share": 1e-4}},
    )


AIT = ait()
