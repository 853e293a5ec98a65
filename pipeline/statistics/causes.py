"""Errors of samples, grouped by cause, with a few samples of each.

A cause is an error's text without what differs between samples: numbers and quoted text. At most
`MOST_CAUSES` causes with `MOST_KEYS` samples each are kept; all others are counted as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MOST_CAUSES = 50

MOST_KEYS = 5

#: The cause under which all further causes are counted.
OTHERS = "other causes"

_DIFFERENT = (
    (r"""b?'(?:[^'\\]|\\.)*'|b?"(?:[^"\\]|\\.)*\"""", "'...'"),
    (r"\d+(?:\.\d+)?", "N"),
)


def causes_of(errors: pa.Array) -> pa.Array:
    """The causes of errors, from their texts."""
    for pattern, mark in _DIFFERENT:
        errors = pc.replace_substring_regex(errors, pattern, mark)
    return errors


@dataclass
class Cause:
    """Samples with the same cause of error.

    Attributes:
        count: number of all samples.
        samples: shard, key and error of a few of them.
    """

    count: int = 0
    samples: list[tuple[str, str, str]] = field(default_factory=list)


class Causes:
    """Errors by cause."""

    def __init__(self) -> None:
        self._causes: dict[str, Cause] = {}

    @property
    def count(self) -> int:
        """Number of errors."""
        return sum(cause.count for cause in self._causes.values())

    def add(self, shard: str, samples: pa.Table) -> None:
        """Counts the errors of samples of a shard, from the columns `key` and `error`."""
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
        """Adds the errors that `other` counted."""
        for text, cause in other._causes.items():
            self._count(text, cause.count, cause.samples)

    def to_record(self) -> list[dict[str, Any]]:
        """The causes, the most frequent first: cause, count, and samples with shard, key and error."""
        names = ("shard", "key", "error")
        return [
            {
                "cause": text,
                "count": cause.count,
                "samples": [dict(zip(names, each, strict=True)) for each in cause.samples],
            }
            for text, cause in sorted(self._causes.items(), key=lambda item: (-item[1].count, item[0]))
        ]

    def _count(self, text: str, count: int, samples: Sequence[tuple[str, str, str]]) -> None:
        if text not in self._causes and len(self._causes) >= MOST_CAUSES:
            text = OTHERS
        cause = self._causes.setdefault(text, Cause())
        cause.count += count
        cause.samples += samples[: MOST_KEYS - len(cause.samples)]
