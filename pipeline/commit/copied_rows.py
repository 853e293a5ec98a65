"""Rows of stored prediction files that the new file of a changed shard copies: those of unchanged images."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.predictions import READ_ERRORS, PredictionOptions, model_output_fields
from pipeline.read import ReadOptions, Sample, Shard, complete_sample, list_samples, sample_table
from pipeline.storage import Storage, content_errors, read_table

#: Columns that describe the image and its predictions. The other columns follow from the current input.
_COPIED = ("version", "width", "height", "error")
_THREADS = 16


@dataclass
class CopiedRows:
    """The stored rows that the prediction file of one shard copies.

    Attributes:
        total: number of images of the shard.
        rows: by URI and version of a prediction file, pairs of a position in the shard and a row of the file.
        errors: number of the rows that are error rows.
    """

    total: int
    rows: dict[tuple[str, str], list[tuple[int, int]]] = field(default_factory=dict)
    errors: int = 0
    _held: dict[tuple[str, str], pa.Table] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of the rows."""
        return sum(map(len, self.rows.values()))

    @property
    def positions(self) -> list[int]:
        """The positions of the copied rows in the shard, in the order of `rows`."""
        return [position for pairs in self.rows.values() for position, _ in pairs]

    @property
    def missing(self) -> list[int]:
        """The positions of the images to label, ascending."""
        return sorted({*range(self.total)} - {*self.positions})

    def merge(
        self,
        labeled: pa.Table,
        shard: Shard,
        storage: Storage,
        options: PredictionOptions,
        read_options: ReadOptions,
    ) -> pa.Table:
        """Returns the samples of the whole shard: those that were labeled now, and the copied rows.

        Raises `StorageError` if a file that was not held is no longer there.
        """
        sources = (self._held.get(x) or self._take(x, _read(storage, x, options)) for x in self.rows)
        stored = pa.concat_tables(sources)
        described, samples = list_samples(shard), list[Sample]()
        for position, error in zip(self.positions, stored["error"].to_pylist(), strict=True):
            sample = described[position]
            if error is not None and error.partition(":")[0] in READ_ERRORS:
                sample = sample.fail(error)
            samples.append(complete_sample(sample, shard, read_options))
        copied = sample_table(samples)
        copied = copied.drop_columns([name for name in stored.column_names if name in copied.column_names])
        for name in stored.column_names:
            copied = copied.append_column(name, stored[name])
        order = np.argsort(np.concatenate([self.missing, self.positions]))
        # Without a new image, `labeled` has no carried columns.
        kept = [x for x in copied.column_names if x in labeled.column_names or x.startswith("carried.")]
        both = pa.concat_tables([labeled, copied.select(kept)], promote_options="permissive")
        return both.take(order)

    def hold(self, source: tuple[str, str], table: pa.Table) -> None:
        """Keeps the rows of a file that is about to be removed."""
        self._held[source] = self._take(source, table)

    def _take(self, source: tuple[str, str], table: pa.Table) -> pa.Table:
        return table.take([row for _, row in self.rows[source]])


def hold_rows(
    copied: Iterable[CopiedRows], storage: Storage, uris: Collection[str], options: PredictionOptions
) -> None:
    """Reads the rows of files that are about to be removed, each file once."""
    users = defaultdict[tuple[str, str], list[CopiedRows]](list)
    for each in copied:
        for source in each.rows:
            if source[0] in uris:
                users[source].append(each)

    def hold(source: tuple[str, str]) -> None:
        table = _read(storage, source, options)
        for each in users[source]:
            each.hold(source, table)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="hold") as pool:
        deque(pool.map(hold, users), 0)


def _read(storage: Storage, source: tuple[str, str], options: PredictionOptions) -> pa.Table:
    outputs = model_output_fields(options.embedding, options.embedding_width)
    with storage.open(*source) as file, content_errors(source[0], "a prediction file"):
        return read_table(file, [*_COPIED, *(column.name for column in outputs)])
