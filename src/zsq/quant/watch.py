"""What a student computes on the way: the values of chosen nodes in one pass."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from zsq.core import Batch, Landmarks
from zsq.core.teacher import only_tokens
from zsq.nets.graph import module_of
from zsq.quant.placement import made_by
from zsq.quant.quantizers import ActivationQuantizer

__all__ = ["quantizer_of", "values_of"]


class _Watcher(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, wanted: frozenset[fx.Node]) -> None:
        super().__init__(graph)
        self.wanted = wanted
        self.seen: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.seen[n] = value
        return value


def values_of(
    graph: fx.GraphModule, wanted: Iterable[fx.Node], batch: Batch, landmarks: Landmarks
) -> tuple[Tensor, dict[fx.Node, Tensor]]:
    """The logits (N, K) of ``batch``, of the tokens that it says, and the values of the nodes in ``wanted``."""
    watcher = _Watcher(graph, frozenset(wanted))
    with only_tokens(graph, landmarks.tokens, batch.tokens):
        logits: Tensor = watcher.run(batch.images)
    return logits, watcher.seen


def quantizer_of(node: fx.Node) -> ActivationQuantizer | None:
    """The quantizer whose grid the values of ``node`` lie on, if their range is known."""
    module = module_of(made_by(node))
    return module if isinstance(module, ActivationQuantizer) and module.ready else None
