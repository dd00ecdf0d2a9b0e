"""SearchRanges: the scales of each layer that change its output least."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from zsq.core import Batch, Job, Landmarks, Recipe, RecipeError, Source, check_counts
from zsq.nets.graph import layers, matmuls, module_of
from zsq.nets.tracing import perform
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer, float_mode, weight_quantizer, weight_quantizers
from zsq.quant.rounding import Nearest
from zsq.quant.watch import quantizer_of, values_of

__all__ = ["SearchRanges"]


@dataclass(frozen=True, kw_only=True)
class SearchRanges(Recipe):
    """PTQ4ViT (Yuan et al., ECCV 2022): scales by the error that they cause at the output of a layer or product.

    The scale s_0 that calibration found is replaced by that of ``narrowest`` s_0 .. ``widest`` s_0 with the least
    sum of (g (y - y'))^2, the scales of weights and of each input in turn. y and the inputs are those of the float
    network, so that layers are independent; a scale stays where no candidate is better.
    """

    guide: Literal["gradient", "none"] = "gradient"
    """g: the gradient at y of the KL divergence of the student as it is from the teacher (Hessian-guided), or 1."""
    rounds: int = 3
    """Turns of weights and inputs."""
    candidates: int = 101
    narrowest: float = 0.01
    widest: float = 1.2
    samples: int = 32
    """Images to look at, at most, in one batch."""

    reads_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self, "rounds", "candidates", "samples")
        if not 0 < self.narrowest <= self.widest:
            raise RecipeError(f"0 < narrowest <= widest, got {self.narrowest} and {self.widest}")

    def apply(self, job: Job, source: Source) -> None:
        """Change ``job.student`` in place; its activation ranges must be set, and its weights rounded to nearest.

        Raises:
            RecipeError: if the rounding of a weight is learned or decided: it belongs to one scale.
        """
        graph = job.student
        nearest = type(Nearest().build(torch.ones(1), torch.ones(1), torch.ones(1)))
        fixed = [name for name, (_, each) in weight_quantizers(graph).items() if not isinstance(each.rounding, nearest)]
        if fixed:
            raise RecipeError(f"SearchRanges moves the scales of weights rounded to nearest, and {fixed[0]} is not")
        batch = source.take(self.samples)
        scales = job.run.cached("search", partial(self._search, job, batch))
        with torch.no_grad():
            for name, scale in scales.items():
                graph.get_parameter(name).copy_(scale)

    def _search(self, job: Job, batch: Batch) -> dict[str, Tensor]:
        """The scales found, by the dotted names of the parameters."""
        graph = job.student
        sites = _sites(graph, batch, job.teacher.landmarks, self.guide)
        factors = torch.linspace(self.narrowest, self.widest, self.candidates, device=job.run.device)
        readers: dict[ActivationQuantizer, list[_Site]] = {}
        for site in sites:
            for quantizer in site.quantizers:
                readers.setdefault(quantizer, []).append(site)
        weights = {site: site.weight for site in sites if site.weight is not None}
        begun: dict[nn.Module, Tensor] = {q: q.scale.detach().clone() for q in weights.values()}
        tried = {quantizer: quantizer.scheme.candidates(quantizer.grid, factors) for quantizer in readers}
        for turn in job.run.progress(self.rounds * len(sites), "search ranges"):
            site = sites[turn % len(sites)]
            if site in weights:
                _search_weight(site, weights[site], begun[weights[site]], factors)
            for quantizer in site.quantizers:
                if readers[quantizer][0] is site:
                    _search_activation(readers[quantizer], quantizer, tried[quantizer])
        searched = {id(quantizer.scale) for quantizer in (*begun, *readers)}
        return {name: each.detach().clone() for name, each in graph.named_parameters() if id(each) in searched}


class _Site:
    """A layer or product: how to compute it from rounded inputs, and what it puts out and matters in float."""

    def __init__(
        self, graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Tensor], importance: Tensor | None
    ) -> None:
        self.graph, self.node, self.values, self.importance = graph, node, values, importance
        self.layer = module_of(node)
        found = {each: quantizer_of(each) for each in node.all_input_nodes}
        self._of = {each: q for each, q in found.items() if q is not None and q.scale.dim() == 0}
        self.quantizers = list(dict.fromkeys(self._of.values()))
        self.weight = weight_quantizer(self.layer) if self.layer is not None else None

    def output(self) -> Tensor:
        """What the quantized layer or product makes of the float inputs."""
        inputs = {node: self._of[node].rounded(x) if node in self._of else x for node, x in self.values.items()}
        args, kwargs = (fx.node.map_arg(each, inputs.__getitem__) for each in (self.node.args, self.node.kwargs))
        made: Tensor = perform(self.node, self.graph, args, kwargs)
        return made

    def errors(self) -> Tensor:
        """(g (y - y'))^2, summed for each output channel (O,); the last dimension where there are no convolutions."""
        error = self.output() - self.values[self.node]
        if self.importance is not None:
            error = error * self.importance
        axis = -1 if self.layer is None or isinstance(self.layer, nn.Linear) else 1
        return error.movedim(axis, 0).flatten(1).square().sum(1)


def _sites(graph: fx.GraphModule, batch: Batch, landmarks: Landmarks, guide: str) -> list[_Site]:
    """The layers and products that read anything quantized, in the order in which they run."""
    every = {*layers(graph), *(product.node for product in matmuls(graph))}
    nodes = [node for node in graph.graph.nodes if node in every]
    wanted = {*nodes, *(each for node in nodes for each in node.all_input_nodes)}
    with torch.no_grad(), float_mode(graph):
        exact, values = values_of(graph, wanted, batch, landmarks)
    gradients: dict[fx.Node, Tensor] = {}
    if guide == "gradient":
        with torch.enable_grad():
            leaf = replace(batch, images=batch.images.detach().clone().requires_grad_())
            found, made = values_of(graph, nodes, leaf, landmarks)
            loss = F.kl_div(F.log_softmax(found, 1), F.softmax(exact, 1), reduction="batchmean")
            gradients = dict(zip(nodes, torch.autograd.grad(loss, [made[node] for node in nodes]), strict=True))
    sites = [
        _Site(graph, node, {each: values[each] for each in (node, *node.all_input_nodes)}, gradients.get(node))
        for node in nodes
    ]
    return [site for site in sites if site.quantizers or site.weight]


@torch.no_grad()
def _search_weight(site: _Site, quantizer: WeightQuantizer, begun: Tensor, factors: Tensor) -> None:
    """Give each row of the weight the best of ``factors`` times the scale that it ``begun`` with."""
    best = quantizer.scale.detach().clone()
    apart = best.numel() > 1
    least = _pooled(site.errors(), apart)
    for factor in factors:
        quantizer.scale.copy_(begun * factor)
        error = _pooled(site.errors(), apart)
        better = (error < least).reshape(best.shape)
        best = torch.where(better, quantizer.scale, best)
        least = torch.minimum(error, least)
    quantizer.scale.copy_(best)


@torch.no_grad()
def _search_activation(sites: list[_Site], quantizer: ActivationQuantizer, scales: Tensor) -> None:
    """Give ``quantizer`` the best of ``scales`` (F, 1) over all ``sites`` that read through it."""
    best = quantizer.scale.detach().clone()
    least = sum(site.errors().sum() for site in sites)
    for scale in scales:
        quantizer.scale.copy_(scale[0])
        error = sum(site.errors().sum() for site in sites)
        if error < least:
            best, least = scale[0], error
    quantizer.scale.copy_(best)


def _pooled(errors: Tensor, apart: bool) -> Tensor:
    return errors if apart else errors.sum(0, keepdim=True)
