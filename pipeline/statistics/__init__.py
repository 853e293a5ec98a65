"""Statistics of labels and of stages: class statistics, confusion, calibration, drift, causes of errors.

NumPy and Arrow only. Reading and writing files does not belong here.
"""

from pipeline.statistics.causes import Causes
from pipeline.statistics.classes import HISTOGRAM_BINS, Calibration, ClassStatistics
from pipeline.statistics.comparison import Agreement, Comparison, LabelSetId, Limits
from pipeline.statistics.confusion import PairCounts
from pipeline.statistics.drift import Classes, Drift
from pipeline.statistics.stages import (
    CLASSIFY,
    COMMIT,
    DECODE,
    STAGES,
    STORAGE,
    Meter,
    StageFigures,
    StageMetrics,
    add_metrics,
    bound_by,
    is_telling,
    stage_figures,
)
from pipeline.statistics.table import CLASS_STATS_SCHEMA, class_cells, class_table, occurring
