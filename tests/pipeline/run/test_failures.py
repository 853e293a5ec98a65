"""Limits on fractions of failures, and the certainty of a sample."""

from __future__ import annotations

import math

import pytest

from pipeline.run.failures import exceeds


@pytest.mark.parametrize(
    ("failed", "count", "limit", "expected"),
    [(0, 0, 0, False), (1, 2, 0.5, False), (2, 3, 0.5, True), (1, 10**6, 0, True), (5, 5, 1, False)],
)
def test_complete_counts_exceed_a_limit_above_it(
    failed: int, count: int, limit: float, expected: bool
) -> None:
    assert exceeds(failed, count, limit) is expected


def test_sample_is_certain_only_if_chance_is_below_one_in_a_thousand() -> None:
    """Exact binomial tails: a sample that counts as certain has a probability of at most 1/1000."""
    for limit in (0.01, 0.1, 0.5, 0.9):
        for count in (1, 5, 10, 30, 100):
            for failed in range(count + 1):
                tail = sum(
                    math.comb(count, k) * limit**k * (1 - limit) ** (count - k)
                    for k in range(failed, count + 1)
                )
                assert not exceeds(failed, count, limit, count) or tail <= 1e-3
    assert [exceeds(n, n, 0.5, n) for n in (9, 10)] == [False, True]
    assert [exceeds(n, n, 0.1, n) for n in (2, 3)] == [False, True]
    assert [exceeds(n, n, 0.01, n) for n in (1, 2)] == [False, True]
