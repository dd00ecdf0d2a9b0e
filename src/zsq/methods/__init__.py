"""One file per paper, in the order of the survey; controls stand apart."""

from zsq.core import Method
from zsq.methods.dfq import DFQ
from zsq.methods.genie import GENIE
from zsq.methods.nearest import NEAREST
from zsq.methods.squant import SQUANT
from zsq.methods.zeroq import ZEROQ

__all__ = ["BASELINES", "METHODS"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        # synthesis-free
        DFQ,
        SQUANT,
        # noise optimisation
        ZEROQ,
        GENIE,
    )
}

BASELINES: dict[str, Method] = {NEAREST.name: NEAREST}
