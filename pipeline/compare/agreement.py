"""Agreement of two models on the same samples: joined on shard and index, a shard at a time.

The two manifests, both sorted by shard, are merged, and tell of each shard whether there is anything to
compare: only prediction files of shards that both sides have, in one version, are opened. In memory are
the names of these, and the open shards' rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple

import pyarrow as pa

from pipeline.compare.label_set import Side, StoredShard
from pipeline.predictions import read_predictions
from pipeline.statistics import Agreement, Classes

_READERS = 16

_AT_ONCE = 10_000


def measure_agreement(
    classes: Classes, a: Side, b: Side, on_progress: Callable[[int], None] = lambda shards: None
) -> Agreement:
    """Reads the labels of the shards that both sides have, and compares them.

    Args:
        classes: of both.
        a: one side.
        b: the other.
        on_progress: told the shards that were looked at.

    Raises:
        StorageError: a manifest or a prediction file can't be read.
    """
    result = Agreement(classes)
    # First of all: while labels are read, which may take hours, a run may write its manifest.
    common = _common(result, a, b)
    done = 0
    with ThreadPoolExecutor(_READERS, thread_name_prefix="compare") as pool:
        while batch := list(islice(common, 4 * _READERS)):
            for pair, rows in zip(batch, pool.map(partial(_read, a, b), batch), strict=True):
                if rows is None:
                    result.leave_out(pair.labelled_a, pair.labelled_b)
                else:
                    result.add(*rows)
            done += len(batch)
            on_progress(done)
    return result


class _Pair(NamedTuple):
    """A shard that both sides have in one version: its prediction files, and their labelled samples."""

    output: str
    version: str
    labelled_a: int
    labelled_b: int


def _common(result: Agreement, a: Side, b: Side) -> Iterator[_Pair]:
    """The shards that can be compared; the others are counted in `result`, at once."""
    tables = []
    pairs = _pairs(result, a, b)
    while some := list(islice(pairs, _AT_ONCE)):  # a million as objects would be a gigabyte
        tables.append(pa.table([*map(pa.array, zip(*some, strict=True))], names=_Pair._fields))
    columns = ((column.to_pylist() for column in table.columns) for table in tables)
    return (_Pair(*values) for each in columns for values in zip(*each, strict=True))


def _pairs(result: Agreement, a: Side, b: Side) -> Iterator[_Pair]:
    for mine, theirs in _merged(a.shards(), b.shards()):
        if mine is not None and theirs is not None and mine.version == theirs.version:
            yield _Pair(mine.output, mine.version, mine.labelled, theirs.labelled)
        else:
            result.leave_out(mine and mine.labelled, theirs and theirs.labelled)


def _merged(
    a: Iterator[StoredShard], b: Iterator[StoredShard]
) -> Iterator[tuple[StoredShard | None, StoredShard | None]]:
    """The same shards in pairs, and the others alone; both sides are sorted."""
    mine, theirs = next(a, None), next(b, None)
    while mine is not None or theirs is not None:
        if theirs is None or (mine is not None and mine.uri < theirs.uri):
            yield mine, None
            mine = next(a, None)
        elif mine is None or theirs.uri < mine.uri:
            yield None, theirs
            theirs = next(b, None)
        else:
            yield mine, theirs
            mine, theirs = next(a, None), next(b, None)


def _read(a: Side, b: Side, pair: _Pair) -> tuple[pa.Table, pa.Table] | None:
    """The labels of a shard on either side; None where one is gone, or of another version of the shard."""
    mine, theirs = _labels(a, pair), _labels(b, pair)
    return None if mine is None or theirs is None else (mine, theirs)


def _labels(side: Side, pair: _Pair) -> pa.Table | None:
    """As they are now: labelled anew, the same version of a shard has labels that are as good."""
    uri = f"{side.partition.uri}/{pair.output}"
    found = read_predictions(side.partition.storage, uri, ["index", "label_id"])
    if found is None or found[0].version != pair.version:
        return None
    return found[1]
