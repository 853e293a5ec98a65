"""Errors of samples grouped by cause, with a few keys of each: of a run, for its record, and of all labels.

A cause is an error's text without what differs from sample to sample: numbers and what stands in quotes.
Bounded: `MOST_CAUSES` causes with `MOST_KEYS` samples each, and all the rest counted as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MOST_CAUSES = 50

MOST_KEYS = 5

#: The cause of what has no room among the others.
OTHERS = "other causes"


_DIFFERENT = (
    (r"""b?'(?:[^'\\]|\\.)*'|b?"(?:[^"\\]|\\.)*\"""", "'...'"),
    (r"\d+(?:\.\d+)?", "N"),
)


def causes_of(errors: pa.Array) -> pa.Array:
    """Errors' texts with their quotes and numbers taken out."""
    for pattern, mark in _DIFFERENT:
        errors = pc.replace_substring_regex(errors, pattern, mark)
    return errors


@dataclass
class Cause:
    """Samples that failed alike.

    Attributes:
        count: how many.
        samples: a few of them: shard, key and error.
    """

    count: int = 0
    samples: list[tuple[str, str, str]] = field(default_factory=list)


class Causes:
    """Errors by cause."""

    def __init__(self) -> None:
        self._causes: dict[str, Cause] = {}

    @property
    def count(self) -> int:
        """Errors in all."""
        return sum(cause.count for cause in self._causes.values())

    def add(self, shard: str, samples: pa.Table) -> None:
        """Counts the errors of some samples of a shard: columns `key` and `error`."""
        bad = samples.select(["key", "error"]).filter(pc.is_valid(samples["error"])).combine_chunks()
        if not bad.num_rows:
            return
        causes = causes_of(bad["error"]).combine_chunks().dictionary_encode()
        places = causes.indices.to_numpy()
        order, counts = np.argsort(places, kind="stable"), np.bincount(places)
        firsts = np.cumsum(counts) - counts
        for text, count, first in zip(causes.dictionary.to_pylist(), counts.tolist(), firsts, strict=True):
            some = bad.take(order[first : first + min(count, MOST_KEYS)]).to_pylist()
            self._count(text, count, [(shard, row["key"], row["error"]) for row in some])

    def merge(self, other: Causes) -> None:
        """Counts another's errors, too."""
        for text, cause in other._causes.items():
            self._count(text, cause.count, cause.samples)

    def to_record(self) -> list[dict[str, Any]]:
        """The most frequent first: cause, count, and samples with shard, key and error."""
        return [
            {"cause": text, "count": cause.count, "samples": [_sample(*each) for each in cause.samples]}
            for text, cause in sorted(self._causes.items(), key=lambda item: (-item[1].count, item[0]))
        ]

    def _count(self, text: str, count: int, samples: Sequence[tuple[str, str, str]]) -> None:
        if text not in self._causes and len(self._causes) >= MOST_CAUSES:
            text = OTHERS
        cause = self._causes.setdefault(text, Cause())
        cause.count += count
        cause.samples += samples[: MOST_KEYS - len(cause.samples)]


def _sample(shard: str, key: str, error: str) -> Mapping[str, str]:
    return {"shard": shard, "key": key, "error": error}
