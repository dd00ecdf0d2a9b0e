"""RidgeCorrection: let the weights of linears make up for the rounding of their inputs, in closed form."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from zsq.core import Job, Recipe, RecipeError, Source, check_counts
from zsq.nets.graph import layers, module_of
from zsq.quant.layers import complete
from zsq.quant.quantizers import float_mode, float_weight, refit
from zsq.quant.watch import quantizer_of, values_of

__all__ = ["RidgeCorrection", "ridge_update"]


@dataclass(frozen=True, kw_only=True)
class RidgeCorrection(Recipe):
    """The second step of ERQ (Zhong et al., ICML 2024): weights and biases that absorb the error of activations.

    For each linear, minus the least |y - (W + dW) [q(x), 1]|^2 + ridge |dW|^2 over all tokens, where y is its output
    and x its input in the float network: layers are independent. Weights are fitted to their grids anew.
    """

    ridge: float = 1000.0
    """Of linears that read tokens (N, T, D); the paper's 0.1 x 10,000."""
    ridge_features: float = 0.1
    """Of linears that read one vector an image (N, D): the head."""
    samples: int = 32
    """Images to look at, at most."""
    batch_size: int = 32

    reads_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self, "samples", "batch_size")
        if not (self.ridge > 0 and self.ridge_features > 0):
            raise RecipeError(f"a ridge must be positive, got {self.ridge} and {self.ridge_features}")

    def apply(self, job: Job, source: Source) -> None:
        """Change ``job.student`` in place; the ranges of its activations must be set."""
        graph = job.student
        reading = {
            node: quantizer
            for node in layers(graph)
            if isinstance(module_of(node), nn.Linear)
            if (quantizer := quantizer_of(node.all_input_nodes[0])) is not None
        }
        inputs = {node: node.all_input_nodes[0] for node in reading}
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        ridges = {}
        for batch in source.batches(self.batch_size, self.samples):
            with torch.no_grad(), float_mode(graph):
                _, seen = values_of(graph, inputs.values(), batch, job.teacher.landmarks)
            for node, quantizer in reading.items():
                x, name = seen[inputs[node]], str(node.target)
                ridges[name] = self.ridge if x.dim() > 2 else self.ridge_features
                found = _moments(x, quantizer.rounded(x))
                sums[name] = tuple(map(torch.add, sums[name], found)) if name in sums else found  # type: ignore[assignment]  # two again
        for name, (gram, cross) in sums.items():
            complete(graph, name)
            layer = graph.get_submodule(name)
            weight, bias = float_weight(layer), layer.bias
            assert isinstance(bias, Tensor)
            with torch.no_grad():
                update = _solve(gram, cross, ridges[name], weight.double())
                weight += update[:, :-1].to(weight)
                bias += update[:, -1].to(bias)
            refit(layer)


def ridge_update(x: Tensor, rounded: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """dW (O, I + 1) with the least |W x - (W + dW) [q(x), 1]|^2 + ridge |dW|^2, the bias in the last column.

    ``x`` and ``rounded``, which is q(x), are (..., I); ``weight`` W is (O, I). In float64:
    dW^T = (A^T A + ridge I)^-1 A^T (x - q(x)) W^T with the rows [q(x), 1] as A.
    """
    return _solve(*_moments(x, rounded), ridge, weight.double())


def _moments(x: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """A^T A (I + 1, I + 1) and A^T (x - q(x)) (I + 1, I), summed over tokens: they do not depend on the weight."""
    x, rounded = x.detach().flatten(0, -2).double(), rounded.flatten(0, -2).double()
    a = torch.cat([rounded, rounded.new_ones(len(rounded), 1)], 1)
    return a.T @ a, a.T @ (x - rounded)


def _solve(gram: Tensor, cross: Tensor, ridge: float, weight: Tensor) -> Tensor:
    regular = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(regular, cross @ weight.T)
    return solved.T
