"""Per-class statistics that merge exactly: any split of the rows, folded, gives the same numbers.

Sums are kept as integers (fixed point), since floating-point addition isn't associative; quantiles
come from a histogram of fixed bins. Nothing here knows of shards, files or runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.statistics.confusion import PairCounts

#: Bins of the score histogram over [0, 1]; a bin's width is the resolution of the quantiles.
HISTOGRAM_BINS = 100

QUANTILE_RESOLUTION = 1 / HISTOGRAM_BINS

#: Fixed point of the sums: kept to 2**-27, an int64 has room for the entropies of 6e9 images of one
#: class, even where there are 22,000 classes (10 nats).
SCALE = 1 << 27


_PARTIAL = pa.schema(
    [
        ("label_id", pa.int32()),
        ("count", pa.int64()),
        ("score_sum", pa.int64()),
        ("score_square_sum", pa.int64()),
        ("score_min", pa.float32()),
        ("score_max", pa.float32()),
        ("entropy_sum", pa.int64()),
        # Only the bins that hold anything: of a thousand classes, a shard has an image or two each.
        ("score_bins", pa.list_(pa.uint8())),
        ("score_bin_counts", pa.list_(pa.int64())),
        ("predicted_with_target", pa.int64()),
        ("support", pa.int64()),
        ("true_positives", pa.int64()),
        ("top5_hits", pa.int64()),
        # Of the rows given this class, the targets that are another one, and how often each.
        ("confused_ids", pa.list_(pa.int32())),
        ("confused_counts", pa.list_(pa.int64())),
        # Of the rows with a target, by bin of their score. These are of all classes: the first row has them.
        ("calibration_bins", pa.list_(pa.uint8())),
        ("calibration_counts", pa.list_(pa.int64())),
        ("calibration_hits", pa.list_(pa.int64())),
        ("calibration_score_sums", pa.list_(pa.int64())),
    ]
)

_CONFUSED = ("confused_ids", "confused_counts")

_CALIBRATION = ("calibration_counts", "calibration_hits", "calibration_score_sums")


@dataclass
class ClassStatistics:
    """Statistics of every class over some rows; arrays of shape (classes,), by class id, but for the last.

    Files of earlier versions lack what `confusion` and `calibration` are made of: these are then of fewer
    rows than the others, and say of how many.

    Attributes:
        count: rows that were given this class.
        score_sum, score_square_sum, entropy_sum: fixed-point sums over those rows, int64 / `SCALE`.
        score_min, score_max: float32; +inf and -inf where there is no row.
        score_histogram: int64 (classes, `HISTOGRAM_BINS`).
        predicted_with_target: rows given this class that carry a target.
        support: rows whose target is this class.
        true_positives: rows given this class whose target it is.
        top5_hits: rows whose target is this class, and is among their five best.
            Too low where rows hold fewer classes than that: see `knows_top5`.
        confusion: pairs (class given, target) of rows that were given another class than their target.
        calibration: int64 (3, `HISTOGRAM_BINS`), by bin of the score, over rows with a target: rows, rows
            whose target is the class given, and the fixed-point sum of their scores.
    """

    count: np.ndarray
    score_sum: np.ndarray
    score_square_sum: np.ndarray
    score_min: np.ndarray
    score_max: np.ndarray
    entropy_sum: np.ndarray
    score_histogram: np.ndarray
    predicted_with_target: np.ndarray
    support: np.ndarray
    true_positives: np.ndarray
    top5_hits: np.ndarray
    confusion: PairCounts
    calibration: np.ndarray

    @classmethod
    def empty(cls, num_classes: int) -> ClassStatistics:
        """The statistics of no rows."""

        def zeros() -> np.ndarray:
            return np.zeros(num_classes, np.int64)

        return cls(
            count=zeros(),
            score_sum=zeros(),
            score_square_sum=zeros(),
            score_min=np.full(num_classes, np.inf, np.float32),
            score_max=np.full(num_classes, -np.inf, np.float32),
            entropy_sum=zeros(),
            score_histogram=np.zeros((num_classes, HISTOGRAM_BINS), np.int64),
            predicted_with_target=zeros(),
            support=zeros(),
            true_positives=zeros(),
            top5_hits=zeros(),
            confusion=PairCounts(),
            calibration=np.zeros((3, HISTOGRAM_BINS), np.int64),
        )

    @property
    def num_classes(self) -> int:
        """Number of classes of the model."""
        return len(self.count)

    @classmethod
    def of(cls, predictions: pa.Table, num_classes: int) -> ClassStatistics:
        """The statistics of prediction rows; rows with an error count nowhere.

        Args:
            predictions: columns `label_id`, `score`, `entropy`, `target_id`, `topk_label_ids`.
            num_classes: number of classes of the model.
        """
        rows = predictions.filter(pc.is_valid(predictions["label_id"]))
        stats = cls.empty(num_classes)
        if rows.num_rows == 0:
            return stats
        label = rows["label_id"].to_numpy()
        score = rows["score"].to_numpy()
        entropy = rows["entropy"].to_numpy()
        np.add.at(stats.count, label, 1)
        np.add.at(stats.score_sum, label, _fixed(score))
        np.add.at(stats.score_square_sum, label, _fixed(score.astype(np.float64) ** 2))
        np.add.at(stats.entropy_sum, label, _fixed(entropy))
        np.minimum.at(stats.score_min, label, score)
        np.maximum.at(stats.score_max, label, score)
        np.add.at(stats.score_histogram, (label, _bins(score)), 1)
        stats._count_targets(rows, label, score)
        return stats

    def _count_targets(self, rows: pa.Table, label: np.ndarray, score: np.ndarray) -> None:
        has_target = pc.is_valid(rows["target_id"]).to_numpy()
        if not has_target.any():
            return
        target = rows["target_id"].filter(pa.array(has_target)).to_numpy()
        label, score = label[has_target], score[has_target]
        topk = rows["topk_label_ids"].filter(pa.array(has_target)).combine_chunks()
        best = topk.flatten().to_numpy().reshape(len(target), -1)[:, :5]
        np.add.at(self.predicted_with_target, label, 1)
        np.add.at(self.support, target, 1)
        np.add.at(self.true_positives, label[label == target], 1)
        np.add.at(self.top5_hits, target[(best == target[:, None]).any(axis=1)], 1)
        is_wrong = label != target
        self.confusion.add(label[is_wrong], target[is_wrong])
        for row, values in zip(self.calibration, (1, ~is_wrong, _fixed(score)), strict=True):
            np.add.at(row, _bins(score), values)

    def add(self, other: ClassStatistics) -> None:
        """Merges other rows' statistics into these.

        Raises:
            ValueError: they are of a model with another number of classes.
        """
        if other.num_classes != self.num_classes:
            raise ValueError(f"statistics of {other.num_classes} classes don't merge with {self.num_classes}")
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            if name == "score_min":
                np.minimum(mine, theirs, out=mine)
            elif name == "score_max":
                np.maximum(mine, theirs, out=mine)
            else:
                mine += theirs  # as arrays and pairs do, in place

    def to_partial(self) -> pa.Table:
        """The mergeable form, one row a class that occurs; `from_partial` is the way back."""
        seen = np.flatnonzero((self.count > 0) | (self.support > 0))
        histogram = self.score_histogram[seen]
        rows, bins = np.nonzero(histogram)
        lists = {"score_bins": (rows, bins), "score_bin_counts": (rows, histogram[rows, bins])}
        label, target, counts = self.confusion.arrays()
        rows = np.searchsorted(seen, label)
        lists |= {"confused_ids": (rows, target), "confused_counts": (rows, counts)}
        bins = np.flatnonzero(self.calibration[0])
        rows = np.zeros(len(bins), np.int64)
        lists["calibration_bins"] = rows, bins
        lists |= {
            name: (rows, values[bins]) for name, values in zip(_CALIBRATION, self.calibration, strict=True)
        }
        columns = {"label_id": pa.array(seen, pa.int32())}
        for field in list(_PARTIAL)[1:]:
            if field.name in lists:
                rows, values = lists[field.name]
                ends = pa.array(np.searchsorted(rows, np.arange(len(seen) + 1)), pa.int32())
                columns[field.name] = pa.ListArray.from_arrays(ends, pa.array(values, field.type.value_type))
            else:
                columns[field.name] = pa.array(getattr(self, field.name)[seen], field.type)
        return pa.table(columns, schema=_PARTIAL)

    @classmethod
    def from_partial(cls, partial: pa.Table, num_classes: int) -> ClassStatistics:
        """The statistics that `to_partial` wrote."""
        stats = cls.empty(num_classes)
        stats.add_partial(partial)
        return stats

    def add_partial(self, partial: pa.Table) -> None:
        """Merges what `to_partial` wrote, or several of such tables one after another, into these."""
        partial = partial.combine_chunks()
        label = partial["label_id"].to_numpy()
        for name, values in vars(self).items():
            if name == "score_histogram":
                rows, bins, counts = _flattened(partial, "score_bins", "score_bin_counts")
                np.add.at(values, (label[rows], bins), counts)
            elif name == "confusion":
                rows, target, counts = _flattened(partial, *_CONFUSED)
                values.add(label[rows], target, counts)
            elif name == "calibration":
                _, bins, *sums = _flattened(partial, "calibration_bins", *_CALIBRATION)
                for row, more in zip(values, sums, strict=True):
                    np.add.at(row, bins, more)
            else:
                fold = {"score_min": np.minimum, "score_max": np.maximum}.get(name, np.add)
                fold.at(values, label, partial[name].to_numpy())

    @property
    def has_targets(self) -> bool:
        """Whether any row carries a target."""
        return bool(self.support.any())

    def top1_accuracy(self) -> float | None:
        """Share of the rows with a target whose class it is; None without targets."""
        return _ratio(int(self.true_positives.sum()), int(self.support.sum()))

    def top5_accuracy(self, topk: int) -> float | None:
        """Share of the rows with a target that has it among their five best; None without targets.

        Args:
            topk: the classes that each row holds; with too few of them, the answer is None.
        """
        if not self.knows_top5(topk):
            return None
        return _ratio(int(self.top5_hits.sum()), int(self.support.sum()))

    def knows_top5(self, topk: int) -> bool:
        """Whether rows of `topk` classes tell if a target is among the five best."""
        return topk >= min(5, self.num_classes)


def _flattened(partial: pa.Table, *names: str) -> list[np.ndarray]:
    """The values of list columns that are alike, after the number of the row that each is of.

    Nothing, where a file of an earlier version has no such columns.
    """
    if names[0] not in partial.column_names:
        return [np.zeros(0, np.int64)] * (len(names) + 1)
    columns = [partial[name].combine_chunks() for name in names]
    rows = pc.list_parent_indices(columns[0]).to_numpy()
    return [rows, *(column.flatten().to_numpy() for column in columns)]


def concatenated(partials: Iterable[pa.Table]) -> pa.Table:
    """Partial statistics one after another, those of earlier versions among them."""
    return pa.concat_tables(partials, promote_options="default")


def merge(parts: Iterable[ClassStatistics], num_classes: int) -> ClassStatistics:
    """The fold of any number of statistics."""
    total = ClassStatistics.empty(num_classes)
    for part in parts:
        total.add(part)
    return total


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
        "score_quantile_resolution": f"{QUANTILE_RESOLUTION:g}",
        "score_std": "population standard deviation",
    },
)


def class_table(stats: ClassStatistics, labels: Sequence[str], topk: int) -> pa.Table:
    """The class statistics that people read: one row a class, those that never occurred too.

    Args:
        stats: the statistics of all rows.
        labels: the classes' names, by class id.
        topk: the classes that each row holds; below five (and below the number of classes), the
            top-5 recall is unknown, and null.
    """
    total = int(stats.count.sum())
    knows_top5 = stats.knows_top5(topk)
    rows = [{"label": label, **_class_row(stats, i, total, knows_top5)} for i, label in enumerate(labels)]
    return pa.Table.from_pylist(rows, schema=CLASS_STATS_SCHEMA)


def _class_row(stats: ClassStatistics, i: int, total: int, knows_top5: bool) -> dict[str, object]:
    count = int(stats.count[i])
    row: dict[str, object] = {"label_id": i, "count": count, "fraction": _ratio(count, total)}
    row["score_histogram"] = stats.score_histogram[i]
    if count:
        score_sum, squares = int(stats.score_sum[i]), int(stats.score_square_sum[i])
        variance = max(0, count * squares * SCALE - score_sum**2) / (count * SCALE) ** 2
        row |= {
            "score_mean": score_sum / (count * SCALE),
            "score_std": variance**0.5,
            "score_min": stats.score_min[i],
            "score_max": stats.score_max[i],
            "score_p05": _quantile(stats.score_histogram[i], 0.05),
            "score_p50": _quantile(stats.score_histogram[i], 0.50),
            "score_p95": _quantile(stats.score_histogram[i], 0.95),
            "entropy_mean": int(stats.entropy_sum[i]) / (count * SCALE),
        }
    if stats.has_targets:
        support, hits = int(stats.support[i]), int(stats.true_positives[i])
        predicted = int(stats.predicted_with_target[i])
        row |= {
            "support": support,
            "true_positives": hits,
            "precision": _ratio(hits, predicted),
            "recall": _ratio(hits, support),
            "f1": _ratio(2 * hits, predicted + support),
            "top5_recall": _ratio(int(stats.top5_hits[i]), support) if knows_top5 else None,
        }
    return row


def _quantile(histogram: np.ndarray, q: float) -> float:
    """The middle of the bin that holds the q-quantile."""
    upto = np.cumsum(histogram)
    return float(np.searchsorted(upto, q * upto[-1], side="left") + 0.5) / HISTOGRAM_BINS


def _bins(scores: np.ndarray) -> np.ndarray:
    return np.minimum((scores * HISTOGRAM_BINS).astype(np.int64), HISTOGRAM_BINS - 1)


def _fixed(values: np.ndarray) -> np.ndarray:
    return np.rint(values.astype(np.float64) * SCALE).astype(np.int64)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
