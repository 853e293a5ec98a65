"""Agreement of two models on the same samples: joined on shard and index, a shard at a time.

The two manifests, both sorted by shard, are merged, and tell of each shard whether there is anything to
compare: only prediction files of shards that both sides have, in one version, are opened. In memory are
the names of these, and the open shards' rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.drift import Classes
from pipeline.pairs import PairCounts
from pipeline.predictions import read_predictions
from pipeline.stored import Side, StoredShard

_READERS = 16
_AT_ONCE = 10_000


@dataclass
class Agreement:
    """How often two sides gave the same samples the same class; arrays by place in `classes.labels`.

    Attributes:
        classes: of both.
        same: samples given this class by both.
        given_a, given_b: compared samples given this class by one side.
        disagreements: pairs (class by the first side, class by the second) that differ.
        compared: samples labelled on both sides.
        only_a, only_b: samples labelled on one side only: those that are error rows on the other, or
            of shards that the other doesn't have.
        shards: that both have, and of which the samples were compared.
        changed_shards: that both have, but labelled in different versions, or labelled in another one, or
            gone, since the manifest was written: not compared.
    """

    classes: Classes
    same: np.ndarray = field(init=False)
    given_a: np.ndarray = field(init=False)
    given_b: np.ndarray = field(init=False)
    disagreements: PairCounts = field(default_factory=PairCounts)
    compared: int = 0
    only_a: int = 0
    only_b: int = 0
    shards: int = 0
    changed_shards: int = 0

    def __post_init__(self) -> None:
        self.same, self.given_a, self.given_b = np.zeros((3, len(self.classes.labels)), np.int64)

    @property
    def share(self) -> float | None:
        """Share of the compared samples that both gave the same class; None without any."""
        return int(self.same.sum()) / self.compared if self.compared else None

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa: agreement beyond what the classes' frequencies alone would give (1960)."""
        if self.share is None:
            return None
        chance = float((self.given_a / self.compared * (self.given_b / self.compared)).sum())
        return (self.share - chance) / (1 - chance) if chance < 1 else None

    def leave_out(self, labelled_a: int | None, labelled_b: int | None) -> None:
        """Counts the labelled samples of a shard that isn't compared; None where a side doesn't have it."""
        self.changed_shards += labelled_a is not None and labelled_b is not None
        self.only_a += labelled_a or 0
        self.only_b += labelled_b or 0

    def add(self, a: pa.Table, b: pa.Table) -> None:
        """Counts the samples of a shard, from the columns `index` and `label_id` of either side."""
        index_a, label_a = _labelled(a)
        index_b, label_b = _labelled(b)
        _, at_a, at_b = np.intersect1d(index_a, index_b, assume_unique=True, return_indices=True)
        first, second = self.classes.ids_a[label_a[at_a]], self.classes.ids_b[label_b[at_b]]
        is_same = first == second
        np.add.at(self.same, first[is_same], 1)
        np.add.at(self.given_a, first, 1)
        np.add.at(self.given_b, second, 1)
        self.disagreements.add(first[~is_same], second[~is_same])
        self.compared += len(first)
        self.only_a += len(label_a) - len(first)
        self.only_b += len(label_b) - len(first)
        self.shards += 1


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


def _labelled(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    rows = rows.filter(rows["label_id"].is_valid())
    return rows["index"].to_numpy(), rows["label_id"].to_numpy()
