from __future__ import annotations

from collections import Counter

import numpy as np

from pipeline.statistics import PairCounts


def pairs(count: int, seed: int, classes: int = 30) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple((rng.beta(0.7, 3, (2, count)) * classes).astype(np.int32))  # type: ignore[return-value]


def test_counts_are_exact_in_whatever_parts_they_come() -> None:
    a, b = pairs(5000, 0)
    expected = Counter(zip(a.tolist(), b.tolist(), strict=True))
    counts, other = PairCounts(), PairCounts()
    for start in range(0, 3000, 100):
        counts.add(a[start : start + 100], b[start : start + 100])
    other.add(a[3000:], b[3000:])
    counts += other
    assert counts.error == 0
    assert {(i, j): n for i, j, n in counts.top(10**6)} == expected
    numbers = [n for _, _, n in counts.top(10)]
    assert numbers == sorted(expected.values(), reverse=True)[:10]


def test_large_class_ids_are_told_apart() -> None:
    counts = PairCounts()
    counts.add(np.array([21_999, 0]), np.array([0, 21_999]), np.array([3, 2]))
    assert counts.top(5) == [(21_999, 0, 3), (0, 21_999, 2)]


def test_beyond_its_bound_frequent_pairs_stay_and_no_count_is_too_low_by_more_than_it_says() -> None:
    counts, expected = PairCounts(most=50), Counter[tuple[int, int]]()
    for seed in range(60):
        a, b = pairs(2000, seed)
        expected.update(zip(a.tolist(), b.tolist(), strict=True))
        part = PairCounts(most=50)
        part.add(a, b)
        counts += part
    found = {(a, b): n for a, b, n in counts.top(50)}
    assert len(counts.arrays()[0]) <= 50
    assert counts.error > 0
    for pair, number in expected.items():
        assert number - counts.error <= found.get(pair, 0) <= number
    assert expected.most_common(1)[0][0] in found
