"""Per-class statistics that merge exactly: merging the parts of any split of the rows gives the same numbers.

Sums are integers (fixed point), since floating-point addition isn't associative. Quantiles come from a
histogram with fixed bins.
"""

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.statistics.confusion import PairCounts

#: Bins of the score histogram over [0, 1]; a bin's width is the resolution of the quantiles.
HISTOGRAM_BINS = 100
CALIBRATION_BINS = 10

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
        # Bins with samples only: of a thousand classes, a shard has an image or two each.
        ("score_bins", pa.list_(pa.uint8())),
        ("score_bin_counts", pa.list_(pa.int64())),
        ("predicted_with_target", pa.int64()),
        ("support", pa.int64()),
        ("true_positives", pa.int64()),
        ("top5_hits", pa.int64()),
        # Other classes that are the target of rows given this class, and the number of these rows.
        ("confused_ids", pa.list_(pa.int32())),
        ("confused_counts", pa.list_(pa.int64())),
        # Rows with a target, by bin of their score. The first row has the figures of all classes.
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

    Arrays have the shape (classes,), by class id, unless stated otherwise.

    Attributes:
        count: rows that were given this class.
        score_sum, score_square_sum, entropy_sum: fixed-point sums over these rows, int64 / `SCALE`.
        score_min, score_max: float32; +inf and -inf where there is no row.
        score_histogram: int64 (classes, `HISTOGRAM_BINS`).
        predicted_with_target: rows given this class that have a target.
        support: rows whose target is this class.
        true_positives: rows given this class whose target is this class.
        top5_hits: rows whose target is this class and is among their five best classes; too low where rows
            have fewer classes (see `has_top5`).
        confusion: pairs (class given, target) of the rows where the two differ.
        calibration: int64 (3, `HISTOGRAM_BINS`), by bin of the score, over rows with a target: rows, rows
            whose target is the class given, and the fixed-point sum of the scores.
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
        """Statistics of no rows."""
        values: dict[str, Any] = {f.name: np.zeros(num_classes, np.int64) for f in fields(cls)}
        values["score_min"] = np.full(num_classes, np.inf, np.float32)
        values["score_max"] = -values["score_min"]
        values["score_histogram"] = np.zeros((num_classes, HISTOGRAM_BINS), np.int64)
        values["calibration"] = np.zeros((3, HISTOGRAM_BINS), np.int64)
        return cls(**values | {"confusion": PairCounts()})

    @classmethod
    def from_predictions(cls, predictions: pa.Table, num_classes: int) -> Self:
        """Computes the statistics of prediction rows; rows with an error are not counted.

        The columns `label_id`, `score`, `entropy`, `target_id`, `topk_label_ids` are read.
        """
        rows = predictions.filter(pc.is_valid(predictions["label_id"]))
        stats = cls.empty(num_classes)
        if rows.num_rows == 0:
            return stats
        label, score, entropy = (rows[name].to_numpy() for name in ("label_id", "score", "entropy"))
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

    def to_partial(self) -> pa.Table:
        """The statistics as a table with one row per class that occurs, for `add_partial`."""
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
        """Adds the statistics of other rows: a table that `to_partial` made, or several concatenated."""
        partial = partial.combine_chunks()
        label = partial["label_id"].to_numpy()
        for name, values in vars(self).items():
            if name == "score_histogram":
                rows, bins, counts = _flattened(partial, "score_bins", "score_bin_counts")
                np.add.at(values, (label[rows], bins), counts)
            elif name == "confusion":
                rows, target, counts = _flattened(partial, "confused_ids", "confused_counts")
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
        """Whether any row has a target."""
        return bool(self.support.any())

    def top1_accuracy(self) -> float | None:
        """Fraction of the rows with a target that were given the target's class; None without targets."""
        return ratio(int(self.true_positives.sum()), int(self.support.sum()))

    def top5_accuracy(self, topk: int) -> float | None:
        """As `top1_accuracy`, with the target among the five best classes; None unless `has_top5`."""
        return ratio(int(self.top5_hits.sum()), int(self.support.sum())) if self.has_top5(topk) else None

    def has_top5(self, topk: int) -> bool:
        """Whether rows with `topk` classes show if a target is among the five best."""
        return topk >= min(5, len(self.count))


@dataclass(frozen=True)
class Calibration:
    """Calibration: whether samples labeled with a score of 0.8 are correct in 80 % of the cases.

    Arrays have the shape (`CALIBRATION_BINS`,): bins of the score of equal width, each with its lower end.

    Attributes:
        counts: samples with a target whose score is in the bin.
        accuracy: fraction of these samples that are labeled with their target; NaN in an empty bin.
        confidence: mean score of these samples; NaN in an empty bin.
    """

    counts: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray

    @classmethod
    def from_statistics(cls, stats: ClassStatistics) -> Self:
        """Computes the calibration of all samples with a target."""
        counts, hits, sums = stats.calibration.reshape(3, CALIBRATION_BINS, -1).sum(axis=2)
        with np.errstate(invalid="ignore"):
            return cls(counts, hits / counts, sums / SCALE / counts)

    @property
    def ece(self) -> float:
        """The expected calibration error: the mean of |accuracy - mean score|, weighted by the bins' samples.

        NaN without samples. See Naeini et al., AAAI 2015; Guo et al., "On Calibration of Modern Neural
        Networks", 2017.
        """
        gaps = np.abs(self.accuracy - self.confidence)
        return float(np.nansum(self.counts * gaps) / self.counts.sum())


def _flattened(partial: pa.Table, *names: str) -> list[np.ndarray]:
    """The values of list columns of equal lengths, after the number of the row that each value is in."""
    columns = [partial[name].combine_chunks() for name in names]
    rows = pc.list_parent_indices(columns[0]).to_numpy()
    return [rows, *(column.flatten().to_numpy() for column in columns)]


def _bins(scores: np.ndarray) -> np.ndarray:
    return np.minimum((scores * HISTOGRAM_BINS).astype(np.int64), HISTOGRAM_BINS - 1)


def _fixed(values: np.ndarray) -> np.ndarray:
    return np.rint(values.astype(np.float64) * SCALE).astype(np.int64)


def ratio(part: int, whole: int) -> float | None:
    """`part / whole`; None where the whole is 0."""
    return part / whole if whole else None
