"""Errors of samples, grouped by cause, with a few samples of each.

A cause is an error's text without what differs between samples: numbers and quoted text. At most
`MOST_CAUSES` causes with `MOST_KEYS` samples each are kept; all others are counted as one.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Self

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


def normalize_errors(errors: pa.Array) -> pa.Array:
    """The causes of errors, from their texts."""
    for pattern, mark in _DIFFERENT:
        errors = pc.replace_substring_regex(errors, pattern, mark)
    return errors


class ErrorCauses:
    """Errors by cause."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._samples: defaultdict[str, list[dict[str, str]]] = defaultdict(list)

    @property
    def count(self) -> int:
        """Number of errors."""
        return self._counts.total()

    def add(self, shard: str, samples: pa.Table) -> None:
        """Counts the errors of samples of a shard, from the columns `key` and `error`."""
        bad = samples.select(["key", "error"]).filter(pc.is_valid(samples["error"]))
        for text, row in zip(normalize_errors(bad["error"]).to_pylist(), bad.to_pylist(), strict=True):
            self._count(text, 1, [{"shard": shard, **row}])

    def merge(self, other: Self) -> None:
        """Adds the errors that `other` counted."""
        for text, count in other._counts.items():
            self._count(text, count, other._samples[text])

    def to_record(self) -> list[dict[str, Any]]:
        """The causes, the most frequent first: cause, count, and samples with shard, key and error."""
        return [
            {"cause": text, "count": count, "samples": self._samples[text]}
            for text, count in sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        ]

    def _count(self, text: str, count: int, samples: Sequence[dict[str, str]]) -> None:
        if text not in self._counts and len(self._counts) >= MOST_CAUSES:
            text = OTHERS
        self._counts[text] += count
        self._samples[text] += samples[: MOST_KEYS - len(self._samples[text])]
