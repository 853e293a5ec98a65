"""The table of class statistics, for `class_stats.parquet`."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.statistics.classes import HISTOGRAM_BINS, SCALE, ClassStatistics

CLASS_STATS_SCHEMA = pa.schema(
    [
        ("label_id", pa.int32()),
        ("label", pa.string()),
        ("count", pa.int64()),
        ("fraction", pa.float64()),
        ("score_mean", pa.float64()),
        ("score_std", pa.float64()),
        ("score_min", pa.float32()),
        ("score_max", pa.float32()),
        ("score_p05", pa.float64()),
        ("score_p50", pa.float64()),
        ("score_p95", pa.float64()),
        ("score_histogram", pa.list_(pa.int64())),
        ("entropy_mean", pa.float64()),
        ("support", pa.int64()),
        ("true_positives", pa.int64()),
        ("precision", pa.float64()),
        ("recall", pa.float64()),
        ("f1", pa.float64()),
        ("top5_recall", pa.float64()),
    ],
    metadata={
        "score_histogram": f"{HISTOGRAM_BINS} bins of equal width over [0, 1]",
        "score_quantile_resolution": f"{1 / HISTOGRAM_BINS:g}",
        "score_std": "population standard deviation",
    },
)


def class_table(stats: ClassStatistics, labels: Sequence[str], topk: int) -> pa.Table:
    """Returns the class statistics with one row per class, including classes that never occur.

    `top5_recall` is null if `topk` is less than five and less than the number of classes.
    """
    count, hits, support = stats.count, stats.true_positives, stats.support
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, and null in the table
        mean = stats.score_sum / (count * SCALE)
        variance = np.maximum(0, stats.score_square_sum / (count * SCALE) - mean**2)
        variance[stats.score_min == stats.score_max] = 0  # the sums are rounded
        values = {
            "label_id": np.arange(len(labels)),
            "label": list(labels),
            "count": count,
            "fraction": count / count.sum(),
            "score_mean": mean,
            "score_std": np.sqrt(variance),
            "score_min": np.where(count, stats.score_min, np.nan),
            "score_max": np.where(count, stats.score_max, np.nan),
            "score_p05": _quantiles(stats, 0.05),
            "score_p50": _quantiles(stats, 0.5),
            "score_p95": _quantiles(stats, 0.95),
            "score_histogram": list(stats.score_histogram),
            "entropy_mean": stats.entropy_sum / (count * SCALE),
        }
        if stats.has_targets:
            values |= {
                "support": support,
                "true_positives": hits,
                "precision": hits / stats.predicted_with_target,
                "recall": hits / support,
                "f1": 2 * hits / (stats.predicted_with_target + support),
            }
            if stats.has_top5(topk):
                values["top5_recall"] = stats.top5_hits / support
    columns = [
        pa.array(values[field.name], field.type, from_pandas=True)
        if field.name in values
        else pa.nulls(len(labels), field.type)
        for field in CLASS_STATS_SCHEMA
    ]
    return pa.table(columns, schema=CLASS_STATS_SCHEMA)


def _quantiles(stats: ClassStatistics, q: float) -> np.ndarray:
    """Returns the middle of the bin that contains the q-quantile of each class; NaN without images."""
    lower_bins = (np.cumsum(stats.score_histogram, axis=1) < q * stats.count[:, None]).sum(axis=1)
    return np.where(stats.count, (lower_bins + 0.5) / HISTOGRAM_BINS, np.nan)


def predicted_classes(classes: pa.Table) -> pa.Table:
    """Returns the rows of a class table whose class was predicted, the most frequent first."""
    predicted = classes.filter(pc.greater(classes["count"], 0))
    return predicted.sort_by([("count", "descending"), ("label_id", "ascending")])
