from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from pipeline.statistics import HISTOGRAM_BINS, Calibration, ClassStatistics, class_table

CLASSES = 7


def predictions(count: int, seed: int = 0, topk: int = 5, targets: bool = True) -> pa.Table:
    """Returns prediction rows. Every tenth row is an error, and every fifth row has no target."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, CLASSES)) * 2
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    order = np.argsort(-p, axis=1)[:, :topk]
    bad = np.arange(count) % 10 == 3
    no_target = np.arange(count) % 5 == 1 if targets else np.ones(count, bool)
    label = pa.array(order[:, 0].astype(np.int32), mask=bad)
    return pa.table(
        {
            "label_id": label,
            "score": pa.array(p.max(axis=1).astype(np.float32), mask=bad),
            "entropy": pa.array(-(p * np.log(p)).sum(axis=1).astype(np.float32), mask=bad),
            "target_id": pa.array(rng.integers(0, CLASSES, count).astype(np.int32), mask=no_target),
            "topk_label_ids": pa.array(
                [None if b else row.tolist() for b, row in zip(bad, order, strict=True)],
                pa.list_(pa.int32()),
            ),
        }
    )


def assert_equal(one: ClassStatistics, other: ClassStatistics) -> None:
    assert one.to_partial().equals(other.to_partial())


def merged(*partials: pa.Table) -> ClassStatistics:
    """Returns the sum of partial statistics."""
    stats = ClassStatistics.empty(CLASSES)
    for partial in partials:
        stats.add_partial(partial)
    return stats


@pytest.mark.parametrize("seed", range(5))
def test_merged_statistics_do_not_depend_on_the_split(seed: int) -> None:
    table = predictions(2000, seed)
    rng = np.random.default_rng(seed)
    cuts = [0, *sorted(rng.integers(0, 2000, rng.integers(1, 40)).tolist()), 2000]
    parts = [
        ClassStatistics.from_predictions(table.slice(start, stop - start), CLASSES).to_partial()
        for start, stop in pairwise(cuts)
    ]
    rng.shuffle(parts)
    assert_equal(merged(*parts), ClassStatistics.from_predictions(table, CLASSES))
    assert_equal(merged(pa.concat_tables(parts)), ClassStatistics.from_predictions(table, CLASSES))


def test_merging_is_associative() -> None:
    table = predictions(999)
    parts = [
        ClassStatistics.from_predictions(table.slice(i, 111), CLASSES).to_partial()
        for i in range(0, 999, 111)
    ]
    halves = [merged(*parts[:4]).to_partial(), merged(*parts[4:]).to_partial()]
    assert_equal(merged(*halves), ClassStatistics.from_predictions(table, CLASSES))


def test_confusion_and_calibration_equal_a_direct_computation() -> None:
    table = predictions(3000)
    rows = [row for row in table.to_pylist() if row["label_id"] is not None and row["target_id"] is not None]
    stats = merged(ClassStatistics.from_predictions(table, CLASSES).to_partial())
    confused = Counter((r["label_id"], r["target_id"]) for r in rows if r["label_id"] != r["target_id"])
    assert {(a, b): n for a, b, n in stats.confusion.most_common(CLASSES**2)} == confused
    found = Calibration.from_statistics(stats)
    assert found.counts.sum() == len(rows)
    error = 0.0
    for i in range(10):
        mine = [r for r in rows if i / 10 <= r["score"] < (i + 1) / 10 + (i == 9)]
        assert found.counts[i] == len(mine)
        if mine:
            accuracy = np.mean([r["label_id"] == r["target_id"] for r in mine])
            confidence = np.mean([r["score"] for r in mine])
            assert found.accuracy[i] == pytest.approx(accuracy)
            assert found.confidence[i] == pytest.approx(confidence, abs=1e-7)
            error += len(mine) / len(rows) * abs(accuracy - confidence)
    assert found.ece == pytest.approx(error, abs=1e-7)


def test_class_table_equals_a_direct_computation() -> None:
    table = predictions(3000)
    rows = [row for row in table.to_pylist() if row["label_id"] is not None]
    labels = [f"class {i}" for i in range(CLASSES)]
    result = class_table(ClassStatistics.from_predictions(table, CLASSES), labels, topk=5).to_pylist()
    assert [row["label"] for row in result] == labels
    for i, row in enumerate(result):
        mine = [r for r in rows if r["label_id"] == i]
        scores = np.array([r["score"] for r in mine])
        assert row["count"] == len(mine)
        assert row["fraction"] == pytest.approx(len(mine) / len(rows))
        assert row["score_mean"] == pytest.approx(scores.mean(), abs=1e-8)
        assert row["score_std"] == pytest.approx(scores.std(), abs=1e-4)
        assert row["score_min"] == pytest.approx(scores.min())
        assert row["score_max"] == pytest.approx(scores.max())
        assert row["entropy_mean"] == pytest.approx(np.mean([r["entropy"] for r in mine]), abs=1e-7)
        for name, q in (("score_p05", 0.05), ("score_p50", 0.5), ("score_p95", 0.95)):
            exact = np.quantile(scores, q, method="inverted_cdf")
            assert row[name] == pytest.approx(exact, abs=0.5 / HISTOGRAM_BINS + 1e-9)
        assert sum(row["score_histogram"]) == len(mine)
        support = [r for r in rows if r["target_id"] == i]
        hits = [r for r in support if r["label_id"] == i]
        claimed = [r for r in mine if r["target_id"] is not None]
        assert row["support"] == len(support)
        assert row["true_positives"] == len(hits)
        assert row["precision"] == pytest.approx(len(hits) / len(claimed))
        assert row["recall"] == pytest.approx(len(hits) / len(support))
        assert row["f1"] == pytest.approx(
            2 * row["precision"] * row["recall"] / (row["precision"] + row["recall"])
        )
        in_top5 = [r for r in support if i in r["topk_label_ids"]]
        assert row["top5_recall"] == pytest.approx(len(in_top5) / len(support))


def test_accuracy_counts_only_rows_with_targets() -> None:
    table = predictions(500)
    rows = [r for r in table.to_pylist() if r["label_id"] is not None and r["target_id"] is not None]
    stats = ClassStatistics.from_predictions(table, CLASSES)
    top1 = np.mean([r["label_id"] == r["target_id"] for r in rows])
    top5 = np.mean([r["target_id"] in r["topk_label_ids"] for r in rows])
    assert stats.top1_accuracy() == pytest.approx(top1)
    assert stats.top5_accuracy(topk=5) == pytest.approx(top5)


def test_top5_is_null_if_rows_have_fewer_classes() -> None:
    stats = ClassStatistics.from_predictions(predictions(100, topk=3), CLASSES)
    assert stats.top5_accuracy(topk=3) is None
    assert class_table(stats, ["x"] * CLASSES, topk=3)["top5_recall"].null_count == CLASSES


def test_columns_of_targets_are_null_without_targets() -> None:
    stats = ClassStatistics.from_predictions(predictions(100, targets=False), CLASSES)
    table = class_table(stats, ["x"] * CLASSES, topk=5)
    for name in ("support", "true_positives", "precision", "recall", "f1", "top5_recall"):
        assert table[name].null_count == CLASSES
    assert stats.top1_accuracy() is None


def test_table_without_rows_has_a_row_per_class() -> None:
    rows = class_table(ClassStatistics.empty(3), ["a", "b", "c"], topk=3).to_pylist()
    assert [row["count"] for row in rows] == [0, 0, 0]
    assert {row["fraction"] for row in rows} == {None}
    assert {row["score_mean"] for row in rows} == {None}


def test_standard_deviation_of_equal_scores_is_almost_zero() -> None:
    table = predictions(1000)
    same = pa.array(np.full(1000, 0.7, np.float32))
    table = table.set_column(table.schema.get_field_index("score"), "score", same)
    rows = class_table(ClassStatistics.from_predictions(table, CLASSES), ["x"] * CLASSES, topk=5).to_pylist()
    assert max(row["score_std"] for row in rows) < 1e-4


def test_score_of_one_is_in_the_last_bin() -> None:
    table = predictions(10)
    table = table.set_column(1, "score", pa.array(np.ones(10, np.float32)))
    stats = ClassStatistics.from_predictions(table, CLASSES)
    assert stats.score_histogram[:, -1].sum() == stats.count.sum() == 9


def test_table_metadata_has_the_quantile_resolution() -> None:
    metadata = class_table(ClassStatistics.empty(1), ["a"], topk=1).schema.metadata
    assert metadata[b"score_quantile_resolution"] == b"0.01"


@pytest.mark.parametrize("scores", [[0.1], [0.7] * 3, [0.123456] * 1000])
def test_standard_deviation_of_equal_scores_is_zero(scores: list[float]) -> None:
    table = predictions(len(scores)).slice(0, 0)
    columns = {
        "label_id": pa.array([2] * len(scores), pa.int32()),
        "score": pa.array(scores, pa.float32()),
        "entropy": pa.array(scores, pa.float32()),
        "target_id": pa.nulls(len(scores), pa.int32()),
        "topk_label_ids": pa.array([[2]] * len(scores), pa.list_(pa.int32())),
    }
    stats = ClassStatistics.from_predictions(pa.table(columns, schema=table.schema), CLASSES)
    assert class_table(stats, "abcdefg", 1)["score_std"][2].as_py() == 0
