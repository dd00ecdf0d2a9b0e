"""Qimera (Choi et al., NeurIPS 2021, arXiv 2111.02625): GDFQ with images made of several classes at once.

Follows the paper's text: a disentanglement mapping before the generator, and embeddings that start at the teacher's
classifier weights. In the released code the mapping never runs, and superposed conditional normalizations are averaged
instead of summed; the preset ``released`` does both. What is matched, distilled and scheduled is GDFQ's. The default
superposes 500 classes, as for ResNet-18 at ImageNet and 4 bits; other networks and data have presets.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.core import Job, Paper, Recipe, RecipeError, check_counts
from zsq.methods.gdfq import GDFQ, SMALL, SMALL_FAST
from zsq.synthesis.networks import Drawn


@dataclass(frozen=True, kw_only=True)
class SuperposedClasses(Recipe):
    """Class embeddings plus noise, of one class or of several with random shares; the shares are the soft label."""

    superposed: int = 500
    """Classes in a superposed image, drawn with replacement."""
    share: float = 0.4
    """Probability with which a whole batch is superposed."""
    mapping: bool = True
    """Whether a linear layer maps the normalized embeddings to ``latent`` entries (disentanglement mapping)."""
    latent: int = 100
    """Size of a latent vector behind the mapping; without, it is that of the teacher's features."""
    from_classifier: bool = True
    """Whether an embedding starts at the classifier's weights for its class, or normal."""

    def __post_init__(self) -> None:
        check_counts(self, "superposed", "latent")
        if not 0 <= self.share <= 1:
            raise RecipeError(f"share must lie in [0, 1], got {self.share}")

    def build(self, job: Job, classes: int) -> nn.Module:
        """The embeddings, and the mapping."""
        weight = job.teacher.module.get_submodule(job.teacher.landmarks.classifier).weight
        assert isinstance(weight, Tensor)
        table = nn.Embedding(classes, weight[0].numel())  # a classifier may be a 1x1 convolution
        if self.from_classifier:
            with torch.no_grad():
                table.weight.copy_(weight.flatten(1))
        return _Superposed(table, self.latent if self.mapping else None)

    def draw(self, count: int, classes: int, code: nn.Module, rng: torch.Generator) -> Drawn:
        """One class an image, or ``superposed`` in the whole batch, with shares softmax(g), g ~ N(0, I)."""
        slots = self.superposed if torch.rand(1, generator=rng).item() < self.share else 1
        labels = torch.randint(classes, (count, slots), generator=rng)
        shares = torch.randn(count, slots, generator=rng).softmax(1)
        size = code.table.embedding_dim  # type: ignore[union-attr]  # what build made
        return Drawn(labels, shares, torch.randn(count, slots, int(size), generator=rng))  # type: ignore[arg-type]  # as above


class _Superposed(nn.Module):
    def __init__(self, table: nn.Embedding, mapped: int | None) -> None:
        super().__init__()
        self.table = table
        self.mapping = nn.Identity() if mapped is None else nn.Linear(table.embedding_dim, mapped)
        self.size = mapped or table.embedding_dim

    def forward(self, drawn: Drawn) -> Tensor:
        latents = self.table(drawn.labels) + drawn.noise  # (N, S, D)
        if drawn.labels.shape[1] == 1:
            latents = F.layer_norm(latents, latents.shape[2:])  # each vector on its own
        else:
            slots = latents.transpose(0, 1)  # each slot over the batch
            latents = F.layer_norm(slots, slots.shape[1:]).transpose(0, 1)
        mixed: Tensor = (drawn.shares[:, :, None] * self.mapping(latents)).sum(1)
        return mixed


TWO_CLASSES = {"synthesizer.latents.superposed": 2}
RELEASED = {
    **GDFQ.presets["released"],
    "synthesizer.latents.mapping": False,
    "synthesizer.latents.from_classifier": False,
    "synthesizer.trunk.superposed": "mean",
}

QIMERA = replace(
    GDFQ.override({"synthesizer.latents": SuperposedClasses()}),
    name="qimera",
    paper=Paper(
        title="Qimera: Data-free Quantization with Synthetic Boundary Supporting Samples",
        venue="NeurIPS 2021",
        arxiv="2111.02625",
    ),
    presets={
        "cifar": {**SMALL, **TWO_CLASSES},
        "fast": {**SMALL_FAST, **TWO_CLASSES},
        "cifar100": {**SMALL, "synthesizer.latents.superposed": 10},
        "mobilenetv2": {"synthesizer.latents.superposed": 100},
        "resnet50": {"synthesizer.latents.share": 0.7},
        "released": RELEASED,
    },
)
