"""Counts of pairs of classes, such as confusions: sparse, mergeable, and with limited memory."""

import numpy as np

#: Distinct pairs that are counted: 16 bytes each, about four times that during a merge.
MAX_PAIRS = 2_000_000
_PENDING = 100_000


class PairCounts:
    """Counts how often each pair (a, b) of class ids occurs.

    At most `limit` distinct pairs are counted, exactly; `uncounted` is the number of occurrences of others.
    """

    def __init__(self, limit: int = MAX_PAIRS) -> None:
        self.uncounted, self._limit = 0, limit
        self._keys = self._counts = np.zeros(0, np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._pending_pairs = 0

    def add(self, a: np.ndarray, b: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Counts pairs, each once or as often as `counts` says."""
        keys = (a.astype(np.int64) << 32) | b.astype(np.int64)
        keys, counts = _summed(keys, np.ones(len(keys), np.int64) if counts is None else counts)
        self._pending.append((keys, counts))
        self._pending_pairs += len(keys)
        if self._pending_pairs > max(_PENDING, len(self._keys)):
            self._merge()

    def to_arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs that occur, sorted, and their counts: a, b, count."""
        self._merge()
        return self._keys >> 32, self._keys & 0xFFFFFFFF, self._counts

    def most_common(self, n: int) -> list[tuple[int, int, int]]:
        """The most frequent pairs: (a, b, count); of equally frequent ones, the first by class id."""
        a, b, counts = self.to_arrays()
        best = np.argsort(-counts, kind="stable")[:n]
        return list(zip(a[best].tolist(), b[best].tolist(), counts[best].tolist(), strict=True))

    @property
    def limit_note(self) -> str:
        """What the limit left out, in words; empty where nothing."""
        more = (
            f"{self._limit:,} pairs of classes are counted; {self.uncounted:,} images of other pairs are not."
        )
        return more if self.uncounted else ""

    def _merge(self) -> None:
        if not self._pending:
            return
        parts = [(self._keys, self._counts), *self._pending]
        keys, counts = _summed(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        if len(keys) > self._limit:
            # Pairs that were counted before stay; the most frequent new ones fill the rest.
            is_new = ~np.isin(keys, self._keys, assume_unique=True)
            kept = np.sort(np.lexsort((-counts, is_new))[: self._limit])
            self.uncounted += int(counts.sum() - counts[kept].sum())
            keys, counts = keys[kept], counts[kept]
        self._keys, self._counts = keys, counts
        self._pending, self._pending_pairs = [], 0


def _summed(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found, place = np.unique(keys, return_inverse=True)
    sums = np.zeros(len(found), np.int64)
    np.add.at(sums, place, counts)
    return found, sums
