"""What goes with a protocol besides the places of its quantizers: how its papers set ranges, and what follows."""

from dataclasses import replace

from zsq.core import Method, Pass
from zsq.quant.grid import PercentileSearch
from zsq.quant.layers import Calibrate, InsertFakeQuant
from zsq.quant.placement import MINMAX_VIT, REPQ_VIT, QuantizationProtocol
from zsq.quant.reparameterize import Reparameterize

__all__ = ["MINMAX_VIT_PASSES", "REPQ_VIT_PASSES", "under"]

MINMAX_VIT_PASSES: tuple[Pass, ...] = (
    InsertFakeQuant(protocol=MINMAX_VIT),
    Calibrate(inputs="float", samples=32, batch_size=32),
)
"""PSAQ-ViT and SMI: the extremes of one float pass over 32 images."""
REPQ_VIT_PASSES: tuple[Pass, ...] = (
    InsertFakeQuant(protocol=REPQ_VIT, range=PercentileSearch()),
    Calibrate(range=PercentileSearch(), samples=32, batch_size=32),
    Reparameterize(),
)
"""RepQ-ViT: ranges from one batch of 32 images, layer after layer, then scale reparameterization."""

_PASSES = {MINMAX_VIT.name: MINMAX_VIT_PASSES, REPQ_VIT.name: REPQ_VIT_PASSES}


def under(method: Method, protocol: QuantizationProtocol) -> Method:
    """``method`` with its quantizers where ``protocol`` says, and the passes that go with it in place of its own.

    These stand where the method inserts its quantizers; its own ``Calibrate`` goes, all other passes stay.
    """
    path = {"quantizer.insert_fake_quant.protocol": protocol}
    passes = _PASSES.get(protocol.name)
    if passes is None:
        return method.override(path)
    steps: list[Pass] = []
    for step in method.quantizer:
        if isinstance(step, InsertFakeQuant):
            steps += passes
        elif not isinstance(step, Calibrate):
            steps.append(step)
    return replace(method, quantizer=tuple(steps)).override(path)
