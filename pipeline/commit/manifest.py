"""The manifest: one row per shard, and the class statistics folded from the rows.

An update streams all rows into one conditional PUT: concurrent writers lose nothing, and memory is bounded.
"""

from __future__ import annotations

import bisect
import io
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import partial
from itertools import compress, islice
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import InputUris
from pipeline.predictions import Footer, deserialize_table, read_footer
from pipeline.statistics import ClassStatistics
from pipeline.storage import ABSENT, Storage, StorageError, content_errors, map_in_threads, read_row_groups

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One row of the manifest. docs/reference/output-schema.md describes the columns.

    `version`, `rows` and `output` are None if no version of the shard is labeled, and `failed_version` if the
    storage failed, so that the next run reads the shard again.
    """

    uri: str
    version: str | None = None
    format: str | None = None
    size: int | None = None
    rows: int | None = None
    errors: int | None = None
    duplicate_keys: int | None = None
    unmatched_targets: int | None = None
    output: str | None = None
    output_version: str | None = None
    error: str | None = None
    failed_version: str | None = None
    readable_rows: int | None = None
    damage: str | None = None
    deleted: bool = False
    run: str | None = None
    committed_at: datetime | None = None
    statistics: bytes | None = None

    @classmethod
    def of_file(cls, footer: Footer, output: str, output_version: str) -> ManifestRow:
        """Returns the row of a prediction file; `run` and `committed_at` are None."""
        names = {field.name for field in fields(cls)} & {field.name for field in fields(footer)}
        values = {name: getattr(footer, name) for name in names} | {"damage": footer.damage or None}
        return cls(footer.shard, output=output, output_version=output_version, **values)

    def merged_with(self, before: ManifestRow | None) -> ManifestRow:
        """Returns the row that replaces an earlier row: a failure keeps the labels of an earlier version."""
        if before is None or before.output is None or self.output is not None:
            return self
        return before.with_state(self.state)

    @property
    def state(self) -> dict[str, Any]:
        """The fields that do not describe the labels: the last failure, and whether the shard was deleted."""
        return {name: getattr(self, name) for name in ("error", "failed_version", "readable_rows", "deleted")}

    def with_state(self, state: Mapping[str, Any]) -> ManifestRow:
        """Returns the same labels with another state."""
        return replace(self, **state)


_TYPES = {"str": pa.string(), "int": pa.int64(), "bool": pa.bool_(), "bytes": pa.binary()}
_TYPES["datetime"] = pa.timestamp("ms", tz="UTC")
_SCHEMA = pa.schema(
    [
        pa.field(each.name, _TYPES[str(each.type).removesuffix(" | None")], "None" in str(each.type))
        for each in fields(ManifestRow)
    ]
)
_ENTRY_FIELDS = (
    "uri", "version", "rows", "errors", "output", "output_version", "error", "failed_version", "deleted",
    "readable_rows", "format", "damage",
)  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """The stored manifest of a partition.

    Attributes:
        partition: URI of the partition.
        group_rows: rows in a row group, about 50 MB with statistics; an update holds one group in memory.
        max_statistics: limit on shards * (classes + 100), about 500 MB. The first rows, up to the limit, hold
            statistics. In later rows the column is null, and statistics are read from the files' footers.
    """

    storage: Storage
    partition: str
    num_classes: int
    group_rows: int = 2000
    max_statistics: int = 17_000_000

    @property
    def uri(self) -> str:
        """URI of `manifest.parquet`."""
        return f"{self.partition}/manifest.parquet"

    def exists(self) -> bool:
        """Returns whether the manifest exists."""
        return self.storage.version(self.uri) != ABSENT

    def read(self, columns: Collection[str]) -> pa.Table:
        """Returns columns of all rows, sorted by URI; empty without a manifest. Raises `StorageError`."""
        empty = _SCHEMA.empty_table().select([*columns])
        return self._read(
            columns,
            lambda tables: pa.concat_tables([empty, *(table.select([*columns]) for table in tables)]),
        )

    def labeled(self, columns: Collection[str], run: str | None = None) -> pa.Table:
        """Returns columns of the shards that have labels; with `run`, only of shards that the run labeled."""
        return _only_labeled(self.read({*columns, "output", "run"}), run).select([*columns])

    def _read(self, columns: Collection[str], consume: Callable[[Iterable[pa.Table]], T]) -> T:
        """Returns `consume` of the row groups; repeats the call if another writer replaces the manifest."""
        rows = partial(_row_groups, self.uri, columns=columns)
        found = self.storage.read_latest(self.uri, lambda file: consume(rows(file)))
        return consume(()) if found is None else found.content

    def entries(self) -> dict[str, ManifestRow]:
        """Returns all rows by URI, with the fields that planning needs; other fields are None."""
        # These columns have few distinct values: dictionary encoding makes one Python object of each.
        shared = {"format", "error", "failed_version", "damage"}
        columns = (
            (column.dictionary_encode() if name in shared else column).to_pylist()
            for name, column in zip(_ENTRY_FIELDS, self.read(_ENTRY_FIELDS).columns, strict=True)
        )
        rows = zip(*columns, strict=True)
        return {row[0]: ManifestRow(**dict(zip(_ENTRY_FIELDS, row, strict=True))) for row in rows}

    def update(
        self,
        rows: Mapping[str, ManifestRow],
        removed: Collection[str] = (),
        states: Mapping[str, ManifestRow] | None = None,
    ) -> None:
        """Updates some rows and keeps the others.

        A row that only reports a read failure keeps the labels of an earlier version of the shard. Of two
        concurrent writers, the later one merges its changes into the rows of the earlier one.

        Args:
            rows: rows to insert or replace, by URI.
            removed: URIs whose rows are removed.
            states: rows whose `state` replaces that of the stored rows, by URI.
        """
        removed, states, added = {*removed}, states or {}, sorted(rows)
        touched = pa.array({*rows, *removed, *states}, pa.string())

        def merged(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
            """Merges the sorted stream of rows with the changes."""
            remaining = added
            for table in tables:
                count = bisect.bisect_right(remaining, table["uri"][-1].as_py())
                inserted, remaining = remaining[:count], remaining[count:]
                is_changed = pc.is_in(table["uri"], value_set=touched)
                if inserted or pc.any(is_changed).as_py():
                    before = {row["uri"]: ManifestRow(**row) for row in table.filter(is_changed).to_pylist()}
                    after = {
                        uri: row.with_state(states.get(uri, row).state)
                        for uri, row in before.items()
                        if uri not in removed
                    }
                    after |= {uri: rows[uri].merged_with(before.get(uri)) for uri in inserted}
                    kept = table.filter(pc.invert(is_changed))
                    changed = _to_table(after.values())
                    table = pa.concat_tables([kept, changed]).sort_by("uri")
                yield table
            yield _to_table(rows[uri] for uri in remaining)

        self._rewrite(merged)

    def replace(self, make_rows: Callable[[], Iterable[ManifestRow]]) -> None:
        """Rewrites all rows, sorted by URI; calls `make_rows` again after a concurrent write."""

        def tables(_: Iterable[pa.Table]) -> Iterator[pa.Table]:
            rows = iter(make_rows())
            while group := list(islice(rows, self.group_rows)):
                yield _to_table(group)

        self._rewrite(tables)

    def runs(self, dataset: InputUris | None = None) -> list[str]:
        """Returns the runs that wrote current labels, sorted; with `dataset`, only labels of its shards."""
        rows = self.labeled(("uri", "run"))
        if dataset is not None:
            rows = rows.filter(pa.array(map(dataset.contains, rows["uri"].to_pylist()), pa.bool_()))
        return sorted(pc.unique(rows["run"]).drop_null().to_pylist())

    def fold_statistics(self, run: str | None = None) -> ClassStatistics:
        """Folds the class statistics of all labeled shards, or of the shards that `run` labeled."""
        return self.fold_runs(None, run=run)[0]

    def fold_runs(
        self, dataset: InputUris | None, *groups: Collection[str], run: str | None = None
    ) -> list[ClassStatistics]:
        """Folds the class statistics of all labeled shards, then of each group of run ids, in one pass.

        The groups count only shards of `dataset`. With `run`, only shards of this run count at all.
        """

        def fold(tables: Iterable[pa.Table]) -> list[ClassStatistics]:
            totals = [ClassStatistics.empty(self.num_classes) for _ in range(1 + len(groups))]
            for table in tables:
                rows = _only_labeled(table, run).to_pylist()
                parts = list(map_in_threads(self._read_partial, rows))
                runs = [
                    row["run"] if dataset is None or dataset.contains(row["uri"]) else None for row in rows
                ]
                selections = [[True] * len(rows), *([each in group for each in runs] for group in groups)]
                for total, selection in zip(totals, selections, strict=True):
                    if selected := list(compress(parts, selection)):
                        total.add_partial(pa.concat_tables(selected))
            return totals

        return self._read(["output", "statistics", "uri", "run"], fold)

    def _read_partial(self, row: Mapping[str, Any]) -> pa.Table:
        """Returns the partial statistics of a shard, from its manifest row or from its prediction file."""
        if row["statistics"] is not None:
            return deserialize_table(row["statistics"])
        uri = f"{self.partition}/{row['output']}"
        with self.storage.open(uri) as file:
            return deserialize_table(read_footer(uri, file).statistics)

    def _rewrite(self, change: Callable[[Iterable[pa.Table]], Iterable[pa.Table]]) -> None:
        """Replaces the manifest; `change` returns all rows, given the current rows in row groups."""
        limit = self.max_statistics // (self.num_classes + 100)
        with tempfile.TemporaryFile() as file:

            def content(version: str) -> BinaryIO:
                file.seek(0)
                file.truncate()
                with ExitStack() as stack, pq.ParquetWriter(file, _SCHEMA, compression="zstd") as writer:
                    rows: Iterable[pa.Table] = ()
                    if version != ABSENT:
                        current = stack.enter_context(self.storage.open(self.uri, version))
                        rows = _row_groups(self.uri, current, _SCHEMA.names)
                    for number, group in enumerate(_regroup(change(rows), self.group_rows)):
                        if number * self.group_rows >= limit:
                            nothing = pa.nulls(group.num_rows, pa.binary())
                            group = group.drop_columns("statistics").append_column("statistics", nothing)
                        writer.write_table(group)
                return file

            self.storage.update(self.uri, content)


def _regroup(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """Yields rows in tables of a fixed size, so that equal rows give equal bytes."""
    pending = _SCHEMA.empty_table()
    for table in tables:
        pending = pa.concat_tables([pending, table.cast(_SCHEMA)])
        while pending.num_rows >= size:
            yield pending.slice(0, size).combine_chunks()
            pending = pending.slice(size)
    if pending.num_rows:
        yield pending.combine_chunks()


def _row_groups(uri: str, file: io.BufferedReader, columns: Collection[str]) -> Iterator[pa.Table]:
    """Yields columns of a manifest, one row group at a time; raises `StorageError` if it isn't one."""
    with content_errors(uri, "a manifest"):
        if missing := sorted(set(_SCHEMA.names) - set(pq.read_schema(file).names)):
            cause = f"not a manifest: no column {', '.join(missing)}; run `cvt-label stats --rebuild`"
            raise StorageError(uri, cause)
        yield from read_row_groups(file, columns)


def _only_labeled(rows: pa.Table, run: str | None) -> pa.Table:
    rows = rows.filter(pc.is_valid(rows["output"]))
    return rows if run is None else rows.filter(pc.equal(rows["run"], run))


def _to_table(rows: Iterable[ManifestRow]) -> pa.Table:
    rows = list(rows)
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in _SCHEMA]
    return pa.table(columns, schema=_SCHEMA)
