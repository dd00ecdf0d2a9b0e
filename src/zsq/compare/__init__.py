"""Compare: a grid of methods, bits, protocols and seeds under equal conditions, beside controls, cell by cell.

The reporting side: what real images there are stay here, in what is measured and in the control that is fed with
them (``RealImages``); methods never see one.
"""

from zsq.compare.controls import RealImages
from zsq.compare.grid import Cell, Comparison, Grid, plan
from zsq.compare.work import compare

__all__ = ["Cell", "Comparison", "Grid", "RealImages", "compare", "plan"]
