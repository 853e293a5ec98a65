"""Agreement of two models on the same samples: joined on shard and index, a shard at a time.

A shard's prediction file has the same path in both partitions, so that two sorted listings are merged and
only the open shards' rows are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.drift import Classes
from pipeline.pairs import PairCounts
from pipeline.predictions import Footer, read_footer
from pipeline.recovering import prediction_files
from pipeline.storage import ObjectInfo, Storage

_READERS = 16


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
        changed_shards: that both have, but labelled in different versions: not compared.
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
    classes: Classes,
    a: tuple[Storage, str, Callable[[str], bool]],
    b: tuple[Storage, str, Callable[[str], bool]],
    on_progress: Callable[[int], None] = lambda shards: None,
) -> Agreement:
    """Reads the labels of both sides, and compares them.

    Args:
        classes: of both.
        a: the storage, the partition's URI, and which prediction files count, by their path in it.
        b: the same of the other side.
        on_progress: told the shards that were looked at.

    Raises:
        StorageError: a prediction file can't be read, or changes meanwhile.
    """
    result = Agreement(classes)
    pairs = _merged(*(_files(storage, uri, counts) for storage, uri, counts in (a, b)))
    done = 0

    def read(pair: tuple[ObjectInfo | None, ObjectInfo | None]) -> tuple[_Labels | None, _Labels | None]:
        whole = None not in pair
        mine, theirs = (
            None if info is None else _read(side[0], info, whole)
            for side, info in zip((a, b), pair, strict=True)
        )
        return mine, theirs

    with ThreadPoolExecutor(_READERS, thread_name_prefix="compare") as pool:
        while batch := list(islice(pairs, 4 * _READERS)):
            for mine, theirs in pool.map(read, batch):
                _count(result, mine, theirs)
                done += 1
            on_progress(done)
    return result


def _count(result: Agreement, mine: _Labels | None, theirs: _Labels | None) -> None:
    if mine is not None and theirs is not None and mine.footer.version == theirs.footer.version:
        result.add(mine.rows, theirs.rows)
        return
    result.changed_shards += mine is not None and theirs is not None
    result.only_a += 0 if mine is None else mine.footer.rows - mine.footer.errors
    result.only_b += 0 if theirs is None else theirs.footer.rows - theirs.footer.errors


@dataclass(frozen=True)
class _Labels:
    footer: Footer
    rows: pa.Table


def _read(storage: Storage, info: ObjectInfo, whole: bool) -> _Labels:
    with storage.open(info.uri, info.version) as file:
        footer = read_footer(info.uri, file)
        columns = ["index", "label_id"]
        return _Labels(footer, pq.read_table(file, columns=columns) if whole else pa.table({}))


def _labelled(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    rows = rows.filter(rows["label_id"].is_valid())
    return rows["index"].to_numpy(), rows["label_id"].to_numpy()


def _files(
    storage: Storage, partition: str, counts: Callable[[str], bool]
) -> Iterator[tuple[str, ObjectInfo]]:
    for info in prediction_files(storage, partition):
        path = info.uri.removeprefix(f"{partition}/")
        if counts(path):
            yield path, info


def _merged(
    a: Iterable[tuple[str, ObjectInfo]], b: Iterable[tuple[str, ObjectInfo]]
) -> Iterator[tuple[ObjectInfo | None, ObjectInfo | None]]:
    """Files of the same path in pairs, and the others alone; both listings are sorted."""
    left, right = iter(a), iter(b)
    mine, theirs = next(left, None), next(right, None)
    while mine is not None or theirs is not None:
        if theirs is None or (mine is not None and mine[0] < theirs[0]):
            assert mine is not None
            yield mine[1], None
            mine = next(left, None)
        elif mine is None or theirs[0] < mine[0]:
            yield None, theirs[1]
            theirs = next(right, None)
        else:
            yield mine[1], theirs[1]
            mine, theirs = next(left, None), next(right, None)
