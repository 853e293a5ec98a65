"""Per-class statistics that merge exactly: the result does not depend on how the rows are split.

Sums are fixed-point integers, because floating-point addition is not associative.
"""

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.statistics.confusion import PairCounts

#: Number of bins of the score histogram over [0, 1]. The bin width is the resolution of the quantiles.
HISTOGRAM_BINS = 100
CALIBRATION_BINS = 10

#: Scale of the fixed-point sums. With a resolution of 2**-27, an int64 can hold the entropies of 6e9 images
#: of one class, even with 22,000 classes (10 nats).
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
        # Only bins with samples: with a thousand classes, a shard has one or two images of a class.
        ("score_bins", pa.list_(pa.uint8())),
        ("score_bin_counts", pa.list_(pa.int64())),
        ("predicted_with_target", pa.int64()),
        ("support", pa.int64()),
        ("true_positives", pa.int64()),
        ("top5_hits", pa.int64()),
        # Targets of wrong predictions of this class, and the number of rows of each target.
        ("confused_ids", pa.list_(pa.int32())),
        ("confused_counts", pa.list_(pa.int64())),
        # Rows with a target, by score bin. The first row of the table has the values of all classes.
        ("calibration_bins", pa.list_(pa.uint8())),
        ("calibration_counts", pa.list_(pa.int64())),
        ("calibration_hits", pa.list_(pa.int64())),
        ("calibration_score_sums", pa.list_(pa.int64())),
    ]
)

_CALIBRATION = ("calibration_counts", "calibration_hits", "calibration_score_sums")


@dataclass
class ClassStatistics:
    """Statistics of every class over prediction rows.

    Arrays have the shape (classes,), by class id, unless stated otherwise. A row of a class is a row that the
    model gave this class.

    Attributes:
        count: Number of rows of the class.
        score_sum, score_square_sum, entropy_sum: Fixed-point sums over these rows, int64 / `SCALE`.
        score_min, score_max: float32; +inf and -inf for a class without rows.
        score_histogram: int64 (classes, `HISTOGRAM_BINS`).
        predicted_with_target: Number of rows of the class that have a target.
        support: Number of rows whose target is the class.
        true_positives: Number of rows of the class whose target is the class.
        top5_hits: Number of rows whose target is the class, and whose five best classes include the target.
        confusion: Pairs (predicted class, target) of the rows where the two differ.
        calibration: int64 (3, `HISTOGRAM_BINS`), by score bin, over the rows with a target: number of rows,
            number of correct rows, and fixed-point sum of the scores.
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
    def empty(cls, num_classes: int) -> Self:
        """Returns the statistics of no rows."""
        values: dict[str, Any] = {f.name: np.zeros(num_classes, np.int64) for f in fields(cls)}
        values["score_min"] = np.full(num_classes, np.inf, np.float32)
        values["score_max"] = -values["score_min"]
        values["score_histogram"] = np.zeros((num_classes, HISTOGRAM_BINS), np.int64)
        values["calibration"] = np.zeros((3, HISTOGRAM_BINS), np.int64)
        return cls(**values | {"confusion": PairCounts()})

    @classmethod
    def from_predictions(cls, predictions: pa.Table, num_classes: int) -> Self:
        """Computes the statistics of prediction rows. Rows with an error are not counted.

        Reads the columns `label_id`, `score`, `entropy`, `target_id` and `topk_label_ids`.
        """
        columns = ["label_id", "score", "entropy", "target_id", "topk_label_ids"]
        rows = predictions.select(columns).filter(pc.is_valid(predictions["label_id"]))
        stats = cls.empty(num_classes)
        label, score, entropy = (rows[name].to_numpy() for name in ("label_id", "score", "entropy"))
        np.add.at(stats.count, label, 1)
        np.add.at(stats.score_sum, label, _to_fixed_point(score))
        np.add.at(stats.score_square_sum, label, _to_fixed_point(score.astype(np.float64) ** 2))
        np.add.at(stats.entropy_sum, label, _to_fixed_point(entropy))
        np.minimum.at(stats.score_min, label, score)
        np.maximum.at(stats.score_max, label, score)
        np.add.at(stats.score_histogram, (label, _score_bins(score)), 1)
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
        for row, values in zip(self.calibration, (1, ~is_wrong, _to_fixed_point(score)), strict=True):
            np.add.at(row, _score_bins(score), values)

    def to_partial(self) -> pa.Table:
        """Returns the statistics as a table for `add_partial`, with one row per class that occurs."""
        seen = np.flatnonzero((self.count > 0) | (self.support > 0))
        histogram = self.score_histogram[seen]
        rows, bins = np.nonzero(histogram)
        lists = {"score_bins": (rows, bins), "score_bin_counts": (rows, histogram[rows, bins])}
        label, target, counts = self.confusion.to_arrays()
        rows = np.searchsorted(seen, label)
        lists |= {"confused_ids": (rows, target), "confused_counts": (rows, counts)}
        bins = np.flatnonzero(self.calibration[0])
        rows = np.zeros(len(bins), np.int64)
        lists["calibration_bins"] = rows, bins
        for name, values in zip(_CALIBRATION, self.calibration, strict=True):
            lists[name] = rows, values[bins]
        columns = [pa.array(seen, pa.int32())]
        for field in list(_PARTIAL)[1:]:
            if field.name in lists:
                rows, values = lists[field.name]
                ends = pa.array(np.searchsorted(rows, np.arange(len(seen) + 1)), pa.int32())
                columns.append(pa.ListArray.from_arrays(ends, pa.array(values, field.type.value_type)))
            else:
                columns.append(pa.array(getattr(self, field.name)[seen], field.type))
        return pa.table(columns, schema=_PARTIAL)

    def add_partial(self, partial: pa.Table) -> None:
        """Adds statistics of other rows: a table of `to_partial`, or several such tables concatenated."""
        partial = partial.combine_chunks()
        label = partial["label_id"].to_numpy()
        for name, values in vars(self).items():
            if name == "score_histogram":
                rows, bins, counts = _flatten_lists(partial, "score_bins", "score_bin_counts")
                np.add.at(values, (label[rows], bins), counts)
            elif name == "confusion":
                rows, target, counts = _flatten_lists(partial, "confused_ids", "confused_counts")
                values.add(label[rows], target, counts)
            elif name == "calibration":
                _, bins, *sums = _flatten_lists(partial, "calibration_bins", *_CALIBRATION)
                for row, more in zip(values, sums, strict=True):
                    np.add.at(row, bins, more)
            else:
                fold = {"score_min": np.minimum, "score_max": np.maximum}.get(name, np.add)
                fold.at(values, label, partial[name].to_numpy())

    @property
    def has_targets(self) -> bool:
        """Returns whether any row has a target."""
        return bool(self.support.any())

    def top1_accuracy(self) -> float | None:
        """Returns the fraction of correct rows among the rows with a target; None without targets."""
        return float(self.true_positives.sum() / self.support.sum()) if self.has_targets else None

    def top5_accuracy(self, topk: int) -> float | None:
        """Returns the top-5 accuracy; None without targets or without the five best classes (`has_top5`)."""
        if not self.has_targets or not self.has_top5(topk):
            return None
        return float(self.top5_hits.sum() / self.support.sum())

    def has_top5(self, topk: int) -> bool:
        """Returns whether rows with `topk` classes contain the five best classes, or all classes."""
        return topk >= min(5, len(self.count))


@dataclass(frozen=True)
class Calibration:
    """Calibration of the scores: whether 80 % of the samples with a score of 0.8 are correct.

    Arrays have the shape (`CALIBRATION_BINS`,), and NaN for an empty bin.

    Attributes:
        counts: Number of samples with a target, by score bin.
        accuracy: Fraction of these samples that are correct.
        confidence: Mean score of these samples.
    """

    counts: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray

    @classmethod
    def from_statistics(cls, stats: ClassStatistics) -> Self:
        """Computes the calibration over all samples with a target."""
        counts, hits, sums = stats.calibration.reshape(3, CALIBRATION_BINS, -1).sum(axis=2)
        with np.errstate(invalid="ignore"):
            return cls(counts, hits / counts, sums / SCALE / counts)

    @property
    def ece(self) -> float:
        """Expected calibration error (Guo et al., 2017): the mean gap of the bins, weighted by `counts`."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float(np.nansum(self.counts * gaps) / self.counts.sum())


def _flatten_lists(partial: pa.Table, *names: str) -> list[np.ndarray]:
    """Returns the row number of each value, and the values, of list columns with equal lengths per row."""
    columns = [partial[name].combine_chunks() for name in names]
    rows = pc.list_parent_indices(columns[0]).to_numpy()
    return [rows, *(column.flatten().to_numpy() for column in columns)]


def _score_bins(scores: np.ndarray) -> np.ndarray:
    return np.minimum((scores * HISTOGRAM_BINS).astype(np.int64), HISTOGRAM_BINS - 1)


def _to_fixed_point(values: np.ndarray) -> np.ndarray:
    return np.rint(values.astype(np.float64) * SCALE).astype(np.int64)
