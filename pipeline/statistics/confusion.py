"""Counts of pairs of classes: sparse, mergeable, and bounded in memory.

Of 22,000 classes there are half a billion pairs, of which few occur: those are counted. Counts are exact up
to `MOST` distinct pairs. Beyond that the rarest are dropped, and every count may be too low by as much as
`error` (the merged summaries of Agarwal et al., "Mergeable Summaries", PODS 2012): the frequent ones stay.
"""

from __future__ import annotations

import numpy as np

#: Distinct pairs that are counted at once: 16 bytes each, some four times that while they are merged.
MOST = 2_000_000

_WAITING = 100_000


class PairCounts:
    """How often each pair (a, b) of class ids occurs.

    Attributes:
        error: how much too low a count may be, at the most.
    """

    def __init__(self, most: int = MOST) -> None:
        self.error = 0
        self._most = most
        self._keys = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting_count = 0

    def add(self, a: np.ndarray, b: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Counts pairs, each once or as often as `counts` says."""
        keys = (a.astype(np.int64) << 32) | b.astype(np.int64)
        self._add(*_summed(keys, np.ones(len(keys), np.int64) if counts is None else counts))

    def __iadd__(self, other: PairCounts) -> PairCounts:
        other._merge()
        self.error += other.error
        self._add(other._keys, other._counts)
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PairCounts):
            return NotImplemented
        mine, theirs = self.arrays(), other.arrays()
        return self.error == other.error and all(map(np.array_equal, mine, theirs))

    __hash__ = None  # type: ignore[assignment]

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs that occur, sorted, and their counts: a, b, count."""
        self._merge()
        return self._keys >> 32, self._keys & 0xFFFFFFFF, self._counts

    def top(self, n: int) -> list[tuple[int, int, int]]:
        """The most frequent pairs: (a, b, count); of equally frequent ones, the first."""
        a, b, counts = self.arrays()
        best = np.argsort(-counts, kind="stable")[:n]
        return [(int(a[i]), int(b[i]), int(counts[i])) for i in best]

    def _add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        self._waiting.append((keys, counts))
        self._waiting_count += len(keys)
        if self._waiting_count > max(_WAITING, len(self._keys)):
            self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        parts = [(self._keys, self._counts), *self._waiting]
        self._waiting, self._waiting_count = [], 0
        self._keys, self._counts = _summed(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        if len(self._keys) > self._most:
            # What the first pair that has no room has is taken from all: so no frequent one is lost.
            cut = int(np.partition(self._counts, -self._most - 1)[-self._most - 1])
            stay = self._counts > cut
            self._keys, self._counts = self._keys[stay], self._counts[stay] - cut
            self.error += cut


def _summed(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found, place = np.unique(keys, return_inverse=True)
    sums = np.zeros(len(found), np.int64)
    np.add.at(sums, place, counts)
    return found, sums
