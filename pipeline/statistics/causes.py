"""Counts of sample errors by cause: the text of an error, with placeholders for numbers and quoted text."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc

#: Maximum number of causes, and of samples that are kept per cause.
MAX_CAUSES = 100
MAX_SAMPLES = 5
_BATCH_ROWS = 1000  # rows in memory as Python objects

#: The cause that counts the errors of all further causes.
OTHER_CAUSES = "other causes"

_PLACEHOLDERS = (
    (r"""b?'(?:[^'\\]|\\.)*'|b?"(?:[^"\\]|\\.)*\"""", "'...'"),
    (r"\d+(?:\.\d+)?", "N"),
)


def normalize_errors(errors: pa.Array) -> pa.Array:
    """Returns the causes of error texts: replaces numbers and quoted text by placeholders."""
    for pattern, placeholder in _PLACEHOLDERS:
        errors = pc.replace_substring_regex(errors, pattern, placeholder)
    return errors


class ErrorCauses:
    """Counts errors by cause."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._samples: defaultdict[str, list[dict[str, str]]] = defaultdict(list)

    @property
    def count(self) -> int:
        """Total number of errors."""
        return self._counts.total()

    def categories(self) -> Counter[str]:
        """Returns the number of errors of each category."""
        found = Counter[str]()
        for text, count in self._counts.items():
            found[text.partition(":")[0]] += count
        return found

    def add(self, shard: str, samples: pa.Table) -> None:
        """Counts the errors of a shard's samples, from the columns `key` and `error`."""
        for batch in samples.select(["key", "error"]).to_batches(_BATCH_ROWS):
            bad = batch.filter(pc.is_valid(batch["error"]))
            for text, row in zip(normalize_errors(bad["error"]).to_pylist(), bad.to_pylist(), strict=True):
                self._count(text, 1, [{"shard": shard, **row}])

    def add_unmatched(self, shard: str, samples: pa.Table) -> None:
        """Counts the labels that are not targets, by text, from the columns `key` and `unmatched`."""
        for batch in samples.select(["key", "unmatched"]).to_batches(_BATCH_ROWS):
            keys, texts = batch.filter(pc.is_valid(batch["unmatched"])).columns
            # Names and ids of classes stay. Other texts, such as of invalid JSON, differ in each sample.
            texts = pc.if_else(pc.starts_with(texts, "the "), normalize_errors(texts), texts)
            for key, text in zip(keys.to_pylist(), texts.to_pylist(), strict=True):
                self._count(text, 1, [{"shard": shard, "key": key}])

    def merge(self, other: Self) -> None:
        """Adds the counts and samples of `other`."""
        for text, count in other._counts.items():
            self._count(text, count, other._samples[text])

    def to_record(self) -> list[dict[str, Any]]:
        """Returns cause, count and samples (shard, key, error) of each cause, sorted by count."""
        return [
            {"cause": text, "count": count, "samples": self._samples[text]}
            for text, count in sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        ]

    def describe(self, count: int) -> str:
        """Returns the most frequent causes with their counts, and the count of all others."""
        record = [each for each in self.to_record() if each["cause"] != OTHER_CAUSES][:count]
        others = self.count - sum(each["count"] for each in record)
        texts = [f"{each['cause']}: {each['count']:,}" for each in record]
        return "; ".join([*texts, f"others: {others:,}"] if others else texts)

    def _count(self, text: str, count: int, samples: Sequence[dict[str, str]]) -> None:
        if text not in self._counts and len(self._counts) >= MAX_CAUSES:
            text = OTHER_CAUSES
        self._counts[text] += count
        self._samples[text] += samples[: MAX_SAMPLES - len(self._samples[text])]
