from __future__ import annotations

from collections import Counter

import numpy as np

from pipeline.statistics import PairCounts


def pairs(count: int, seed: int, classes: int = 30) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple((rng.beta(0.7, 3, (2, count)) * classes).astype(np.int32))


def test_counts_are_exact_for_any_split() -> None:
    a, b = pairs(5000, 0)
    counts, expected = PairCounts(), Counter(zip(a.tolist(), b.tolist(), strict=True))
    for start in range(0, 5000, 100):
        counts.add(a[start : start + 100], b[start : start + 100])
    assert {(i, j): n for i, j, n in counts.most_common(10**6)} == expected
    assert [n for _, _, n in counts.most_common(10)] == sorted(expected.values(), reverse=True)[:10]
    assert (counts.uncounted, counts.limit_note) == (0, "")


def test_large_class_ids_are_distinguished() -> None:
    counts = PairCounts()
    counts.add(np.array([21_999, 0]), np.array([0, 21_999]), np.array([3, 2]))
    assert counts.most_common(5) == [(21_999, 0, 3), (0, 21_999, 2)]


def test_kept_counts_beyond_the_limit_are_exact() -> None:
    counts, expected = PairCounts(50), Counter[tuple[int, int]]()
    for seed in range(60):
        a, b = pairs(2000, seed)
        counts.add(a, b)
        expected.update(zip(a.tolist(), b.tolist(), strict=True))
        counts.to_arrays()  # merges the pending pairs
    found = {(a, b): n for a, b, n in counts.most_common(10**6)}
    assert len(found) == 50 < len(expected)
    assert {pair: expected[pair] for pair in found} == found
    assert counts.uncounted == expected.total() - sum(found.values())
    assert f"{counts.uncounted:,} images of other pairs are not" in counts.limit_note
    assert expected.most_common(1)[0][0] in found
