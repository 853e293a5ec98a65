"""Calibration: whether samples labeled with a score of 0.8 are correct in 80 % of the cases.

The expected calibration error (ECE) is the mean of |accuracy - mean score| over bins of the score, weighted
by their samples (Naeini et al., AAAI 2015; Guo et al., "On Calibration of Modern Neural Networks", 2017).
Here it has `CALIBRATION_BINS` bins of equal width, each with its lower end. Counts and sums are exact.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from pipeline.statistics.classes import SCALE, ClassStatistics

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Calibration:
    """Accuracy by score; arrays of shape (`CALIBRATION_BINS`,).

    Attributes:
        counts: samples with a target whose score is in the bin.
        accuracy: fraction of these samples that are labeled with their target; NaN in an empty bin.
        confidence: mean score of these samples; NaN in an empty bin.
    """

    counts: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray

    @classmethod
    def of(cls, stats: ClassStatistics) -> Self:
        """Computes the calibration of all samples with a target."""
        counts, hits, sums = stats.calibration.reshape(3, CALIBRATION_BINS, -1).sum(axis=2)
        with np.errstate(invalid="ignore"):
            return cls(counts, hits / counts, sums / SCALE / counts)

    @property
    def ece(self) -> float:
        """The expected calibration error; NaN without samples."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float(np.nansum(self.counts * gaps) / self.counts.sum())
