"""Comparison of two label sets: drift by class, and agreement sample by sample.

Reading what is compared belongs here. The figures are defined in `statistics`, and `report` draws them.
"""

from pipeline.compare.comparing import (
    LabelSet,
    NoPreviousRunError,
    RunPair,
    compare,
    compare_labels,
    write_comparison,
)
