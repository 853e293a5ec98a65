"""Counts of class pairs, for example of a confusion matrix: sparse, mergeable, with limited memory."""

import numpy as np

#: Maximum number of distinct pairs. A pair needs 16 bytes, and about 64 bytes during a merge.
MAX_PAIRS = 2_000_000
_MAX_PENDING = 100_000


class PairCounts:
    """Counts the occurrences of each pair (a, b) of class ids.

    The counts of at most `limit` distinct pairs are kept. Kept counts are exact.

    Attributes:
        uncounted: Number of occurrences of pairs that were not kept.
    """

    def __init__(self, limit: int = MAX_PAIRS) -> None:
        self.uncounted, self._limit = 0, limit
        self._keys = self._counts = np.zeros(0, np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._pending_pairs = 0

    def add(self, a: np.ndarray, b: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Adds pairs: one occurrence each, or `counts` occurrences."""
        keys = (a.astype(np.int64) << 32) | b.astype(np.int64)
        keys, counts = _sum_counts(keys, np.ones(len(keys), np.int64) if counts is None else counts)
        self._pending.append((keys, counts))
        self._pending_pairs += len(keys)
        if self._pending_pairs > max(_MAX_PENDING, len(self._keys)):
            self._merge()

    def to_arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the sorted pairs and their counts as arrays a, b, count."""
        self._merge()
        return self._keys >> 32, self._keys & 0xFFFFFFFF, self._counts

    def most_common(self, n: int) -> list[tuple[int, int, int]]:
        """Returns the `n` most frequent pairs as (a, b, count); ties are sorted by class id."""
        a, b, counts = self.to_arrays()
        best = np.argsort(-counts, kind="stable")[:n]
        return list(zip(a[best].tolist(), b[best].tolist(), counts[best].tolist(), strict=True))

    @property
    def limit_note(self) -> str:
        """A sentence about the occurrences that were not counted; empty if all were counted."""
        more = (
            f"{self._limit:,} pairs of classes are counted; {self.uncounted:,} images of other pairs are not."
        )
        return more if self.uncounted else ""

    def _merge(self) -> None:
        if not self._pending:
            return
        parts = [(self._keys, self._counts), *self._pending]
        keys, counts = _sum_counts(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        if len(keys) > self._limit:
            # All old pairs are kept, so that their counts stay exact; then the most frequent new pairs.
            is_new = ~np.isin(keys, self._keys, assume_unique=True)
            kept = np.sort(np.lexsort((-counts, is_new))[: self._limit])
            self.uncounted += int(counts.sum() - counts[kept].sum())
            keys, counts = keys[kept], counts[kept]
        self._keys, self._counts = keys, counts
        self._pending, self._pending_pairs = [], 0


def _sum_counts(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sorted distinct keys, and the sum of the counts of each key."""
    distinct, index = np.unique(keys, return_inverse=True)
    sums = np.zeros(len(distinct), np.int64)
    np.add.at(sums, index, counts)
    return distinct, sums
