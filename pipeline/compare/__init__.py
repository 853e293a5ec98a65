"""Comparison of two label sets: drift by class, and agreement sample by sample.

This package reads the label sets. `statistics` defines the metrics, and `report` draws them.
"""

from pipeline.compare.label_sets import (
    LabelSet,
    NoPreviousRunError,
    RunPair,
    compare_label_sets,
    compare_labels,
)
