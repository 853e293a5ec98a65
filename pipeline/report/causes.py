"""Errors of samples grouped by cause, with a few keys of each: of a run, for its record, and of all labels.

A cause is an error's text without what differs from sample to sample: numbers and what stands in quotes.
Bounded: `MOST_CAUSES` causes with `MOST_KEYS` samples each, and all the rest counted as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.predictions import read_predictions
from pipeline.statistics import Causes
from pipeline.storage import Storage

#: What `read_causes` wants to know of shards.
SHARD_COLUMNS = ("uri", "errors", "output")

_READERS = 16


def read_causes(
    storage: Storage, partition: str, shards: Iterable[pa.Table], most_files: int
) -> tuple[Causes, int]:
    """The causes of the errors in labels as they lie there; only files that have any are read.

    Of more than so many such files, those with the most errors are.

    Args:
        storage: access to them.
        partition: its URI.
        shards: `SHARD_COLUMNS` of the manifest.
        most_files: files that are read, at the most.

    Returns:
        them, and how many of the files are not there.

    Raises:
        StorageError: a prediction file can't be read.
    """
    order = [("errors", "descending"), ("uri", "ascending")]
    worst: list[dict[str, Any]] = []
    for table in shards:
        bad = table.filter(pc.greater(table["errors"], 0))
        bad = pa.concat_tables([pa.Table.from_pylist(worst, bad.schema), bad])
        worst = bad.take(pc.select_k_unstable(bad, most_files, order)).to_pylist()

    def read(row: Mapping[str, Any]) -> Causes | None:
        found = read_predictions(storage, f"{partition}/{row['output']}", ["key", "error"])
        if found is None:
            return None
        causes = Causes()
        causes.add(row["uri"], found[1])
        return causes

    total, missing = Causes(), 0
    with ThreadPoolExecutor(_READERS, thread_name_prefix="causes") as pool:
        for causes in pool.map(read, worst):
            if causes is None:
                missing += 1
            else:
                total.merge(causes)
    return total, missing
