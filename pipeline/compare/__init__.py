"""Two sets of labels compared: drift, and agreement sample by sample.

The figures are defined in `statistics`; drawing them belongs to `report`.
"""

from pipeline.compare.comparing import compare
from pipeline.compare.label_set import NoPreviousRunError, Side
from pipeline.compare.runs import Succession

__all__ = ["NoPreviousRunError", "Side", "Succession", "compare"]
