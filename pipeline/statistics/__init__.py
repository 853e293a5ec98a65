"""Statistics of labels and stages: class statistics, confusion, calibration, drift, causes of errors.

This package uses only NumPy and Arrow, and does no I/O.
"""

from pipeline.statistics.causes import ErrorCauses
from pipeline.statistics.classes import HISTOGRAM_BINS, Calibration, ClassStatistics
from pipeline.statistics.comparison import AgreementStatistics, Comparison, LabelSetId, limit_violations
from pipeline.statistics.confusion import PairCounts
from pipeline.statistics.drift import ClassMapping, Drift
from pipeline.statistics.stages import (
    CLASSIFY,
    COMMIT,
    DECODE,
    STAGES,
    STORAGE,
    StageMetrics,
    StageTimer,
    describe_bottleneck,
    steady_rate,
    summarize_stages,
)
from pipeline.statistics.table import CLASS_STATS_SCHEMA, class_table, predicted_classes
