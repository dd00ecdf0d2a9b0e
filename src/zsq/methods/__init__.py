"""One file per paper, in the order of the survey; controls stand apart."""

from collections.abc import Callable

from zsq.core import Method
from zsq.methods.ait import AIT, ait
from zsq.methods.dfq import DFQ
from zsq.methods.gdfq import GDFQ
from zsq.methods.genie import GENIE
from zsq.methods.hast import HAST
from zsq.methods.intraq import INTRAQ
from zsq.methods.nearest import NEAREST
from zsq.methods.psaq_vit import PSAQ_VIT
from zsq.methods.qimera import QIMERA
from zsq.methods.smi import SMI
from zsq.methods.squant import SQUANT
from zsq.methods.synq import SYNQ, synq
from zsq.methods.zeroq import ZEROQ

__all__ = ["BASELINES", "METHODS", "PLUGINS"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        # synthesis-free
        DFQ,
        SQUANT,
        # noise optimisation
        ZEROQ,
        INTRAQ,
        GENIE,
        HAST,
        SYNQ,
        # noise optimisation, for vision transformers
        PSAQ_VIT,
        SMI,
        # generators
        GDFQ,
        QIMERA,
        AIT,
    )
}

PLUGINS: dict[str, Callable[[Method], Method]] = {"synq": synq, "ait": ait}
"""Papers that improve a host, written ``ait+qimera``; alone they have the host of their paper."""

BASELINES: dict[str, Method] = {NEAREST.name: NEAREST}
