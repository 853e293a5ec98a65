"""The table of class statistics, for `class_stats.parquet` and as text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.statistics.classes import HISTOGRAM_BINS, SCALE, ClassStatistics, ratio
from pipeline.text import format_percent, format_score

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
    total, has_top5 = int(stats.count.sum()), stats.has_top5(topk)
    rows = [
        {"label_id": i, "label": label, **_class_row(stats, i, total, has_top5)}
        for i, label in enumerate(labels)
    ]
    return pa.Table.from_pylist(rows, schema=CLASS_STATS_SCHEMA)


def _class_row(stats: ClassStatistics, i: int, total: int, has_top5: bool) -> dict[str, object]:
    count, histogram = int(stats.count[i]), stats.score_histogram[i]
    row: dict[str, object] = {"count": count, "fraction": ratio(count, total), "score_histogram": histogram}
    if count:
        score_sum, squares = int(stats.score_sum[i]), int(stats.score_square_sum[i])
        variance = max(0, count * squares * SCALE - score_sum**2) / (count * SCALE) ** 2
        if stats.score_min[i] == stats.score_max[i]:  # the sums are rounded
            variance = 0.0
        row |= {
            "score_mean": score_sum / (count * SCALE),
            "score_std": variance**0.5,
            "score_min": stats.score_min[i],
            "score_max": stats.score_max[i],
            **{f"score_p{q:02d}": _quantile(histogram, q / 100) for q in (5, 50, 95)},
            "entropy_mean": int(stats.entropy_sum[i]) / (count * SCALE),
        }
    if stats.has_targets:
        support, hits = int(stats.support[i]), int(stats.true_positives[i])
        predicted = int(stats.predicted_with_target[i])
        row |= {
            "support": support,
            "true_positives": hits,
            "precision": ratio(hits, predicted),
            "recall": ratio(hits, support),
            "f1": ratio(2 * hits, predicted + support),
            "top5_recall": ratio(int(stats.top5_hits[i]), support) if has_top5 else None,
        }
    return row


def _quantile(histogram: np.ndarray, q: float) -> float:
    """Returns the middle of the bin that contains the q-quantile."""
    cumulative = np.cumsum(histogram)
    return float(np.searchsorted(cumulative, q * cumulative[-1], side="left") + 0.5) / HISTOGRAM_BINS


def predicted_classes(classes: pa.Table) -> list[dict[str, Any]]:
    """Returns the rows of a class table whose class was predicted, the most frequent first."""
    rows = classes.drop_columns(["score_histogram"]).to_pylist()
    return sorted((row for row in rows if row["count"]), key=lambda row: (-row["count"], row["label_id"]))


def format_class_row(row: Mapping[str, Any]) -> list[str]:
    """Returns a class's values as text: images, fraction, mean score, three score quantiles.

    If there are targets, precision, recall and F1 follow.
    """
    cells = [f"{row['count']:,}", format_percent(row["fraction"])]
    cells += [format_score(row[name]) for name in ("score_mean", "score_p05", "score_p50", "score_p95")]
    if row["support"] is not None:
        cells += [format_percent(row["precision"]), format_percent(row["recall"]), format_score(row["f1"])]
    return cells
