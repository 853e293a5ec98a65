"""Calibration: whether samples labelled with a score of 0.8 are right in 80 % of the cases.

The expected calibration error (ECE) is the mean of |accuracy - mean score| over bins of the score, weighted
by their samples (Naeini et al., AAAI 2015; Guo et al., "On Calibration of Modern Neural Networks", 2017),
here `CALIBRATION_BINS` bins of equal width, each with its lower end. Nothing is estimated: counts and sums
are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.statistics.classes import SCALE, ClassStatistics

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Calibration:
    """Accuracy by score; arrays of shape (`CALIBRATION_BINS`,).

    Attributes:
        counts: samples with a target whose score is in the bin.
        accuracy: share of them that are labelled with it; NaN where there is none.
        confidence: their mean score; NaN likewise.
    """

    counts: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray

    @classmethod
    def of(cls, stats: ClassStatistics) -> Calibration | None:
        """From class statistics; None where no sample has a target."""
        counts, hits, sums = stats.calibration.reshape(3, CALIBRATION_BINS, -1).sum(axis=2)
        if not counts.any():
            return None
        with np.errstate(invalid="ignore"):
            return cls(counts, hits / counts, sums / SCALE / counts)

    @property
    def samples(self) -> int:
        """Samples that it is of."""
        return int(self.counts.sum())

    @property
    def ece(self) -> float:
        """The expected calibration error."""
        return float(np.nansum(self.counts * np.abs(self.accuracy - self.confidence)) / self.samples)

    @property
    def edges(self) -> np.ndarray:
        """The bins' lower ends, and the last one's upper end."""
        return np.linspace(0, 1, CALIBRATION_BINS + 1)
