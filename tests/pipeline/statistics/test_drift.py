from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.statistics import HISTOGRAM_BINS, ClassMapping, Drift
from pipeline.statistics.drift import js_divergence_by_class, psi_by_class


def psi(a: np.ndarray, b: np.ndarray) -> float:
    return float(psi_by_class(a, b).sum())


def js_distance(a: np.ndarray, b: np.ndarray) -> float:
    return between(a, b).js_distance


def between(a: np.ndarray, b: np.ndarray) -> Drift:
    """Returns the drift between counts of the same classes, with a score of 0.95 for all images."""
    labels = [f"class {i}" for i in range(len(a))]
    return Drift(ClassMapping.matched(labels, labels), with_histogram(a), with_histogram(b))


def with_histogram(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    histogram = np.zeros((len(counts), HISTOGRAM_BINS), np.int64)
    histogram[:, 95] = counts
    return counts, histogram


def test_psi_equals_the_textbook_formula() -> None:
    a, b = np.array([500, 300, 200]), np.array([400, 300, 300])
    expected = sum(
        ((y + 0.5) / 1001.5 - (x + 0.5) / 1001.5) * math.log((y + 0.5) / (x + 0.5))
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    )
    assert psi(a, b) == pytest.approx(expected)
    assert psi(a, b) == pytest.approx(psi(b, a))
    assert psi(a, a) == 0


def test_psi_of_an_empty_class_is_finite() -> None:
    a, b = np.array([10, 0]), np.array([5, 5])
    assert 0 < psi(a, b) < 10
    assert psi(np.append(a, 0), np.append(b, 0)) == psi(a, b)


def test_mean_psi_without_drift_equals_psi_by_chance() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(40, 5.0))
    samples = [(rng.multinomial(20_000, p), rng.multinomial(5000, p)) for _ in range(300)]
    found = np.mean([psi(a, b) for a, b in samples])
    assert found == pytest.approx(between(*samples[0]).psi_by_chance, rel=0.05)


def test_jensen_shannon_distance_is_0_for_equal_and_1_for_disjoint() -> None:
    assert js_distance(np.array([1, 3]), np.array([10, 30])) == pytest.approx(0, abs=1e-8)
    assert js_distance(np.array([5, 0]), np.array([0, 7])) == 1
    # scipy.spatial.distance.jensenshannon([1, 0], [0.5, 0.5], base=2), from its documentation:
    assert js_distance(np.array([1, 0]), np.array([1, 1])) == pytest.approx(0.5579230452841438)


def test_divergence_by_class_sums_to_the_squared_distance() -> None:
    a, b = np.array([50, 50, 0, 0, 7]), np.array([50, 30, 20, 0, 7])
    parts = js_divergence_by_class(a, b)
    assert parts.sum() == pytest.approx(js_distance(a, b) ** 2)
    assert parts.argmax() == 2
    assert parts[3] == parts[0] == parts[4] == 0


def test_classes_are_matched_by_name_and_order() -> None:
    classes = ClassMapping.matched(["crane", "boot", "crane"], ["bag", "crane", "crane", "boot"])
    assert classes.labels == ["crane", "boot", "crane", "bag"]
    assert classes.ids_b.tolist() == [3, 0, 2, 1]
    assert (classes.only_a, classes.only_b) == (0, 1)


def test_drift_compares_classes_by_name_not_by_id() -> None:
    first, swapped = with_histogram(np.array([30, 10])), with_histogram(np.array([10, 30]))
    same = Drift(ClassMapping.matched(["a", "b"], ["b", "a"]), first, swapped)
    assert same.psi == same.js_distance == same.score_psi == 0
    other = Drift(ClassMapping.matched(["a", "b"], ["a", "c"]), first, first)
    assert other.count_b.tolist() == [30, 0, 10]
    assert other.js_distance == pytest.approx(0.5)
    assert [other.classes.labels[i] for i in other.most_changed(2)] == ["b", "c"]
    assert np.isnan(other.class_score_psi).tolist() == [False, True, True]
