"""The manifest: what is labelled, one row a shard, and the per-class statistics folded from it.

It is a fold over the prediction files, never the truth itself: `recovering` makes it anew from them. It is
rewritten in one conditional PUT, as a stream, so that neither two writers nor its size do any harm.
"""

from __future__ import annotations

import bisect
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime
from itertools import islice
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.predictions import (
    Footer,
    pack_partial,
    read_footer,
    unpack_partial,
)
from pipeline.statistics import ClassStatistics
from pipeline.storage import (
    ABSENT,
    BucketNotFound,
    ObjectChanged,
    ObjectNotFound,
    Storage,
    StorageError,
    lies_in,
)

#: Rows of a row group, with statistics (some 50 MB) and without (some 10 MB): what is in memory at once
#: while the manifest is rewritten.
ROW_GROUP_ROWS = 2000

BARE_ROW_GROUP_ROWS = 50_000

#: Shards times (classes + 100), up to which rows hold their statistics: some 500 MB. In a larger
#: manifest that column is null, and the statistics are folded from the footers of the files.
MOST_STATISTICS = 17_000_000

_READERS = 32


_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        ("version", pa.string()),
        ("format", pa.string()),
        ("size", pa.int64()),
        ("rows", pa.int64()),
        ("errors", pa.int64()),
        ("duplicate_keys", pa.int64()),
        ("output", pa.string()),
        ("output_version", pa.string()),
        ("error", pa.string()),
        ("failed_version", pa.string()),
        pa.field("gone", pa.bool_(), nullable=False),
        ("run", pa.string()),
        ("committed_at", pa.timestamp("ms", tz="UTC")),
        ("statistics", pa.binary()),
    ]
)


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """What became of a shard.

    Attributes:
        uri: the shard.
        version: the version of it that is labelled; None where none is.
        format, size: of the shard, as it was last read.
        rows: its samples; None where none is labelled.
        errors: samples that are error rows.
        duplicate_keys: samples whose key an earlier sample of the shard has.
        output: its prediction file, relative to the model's partition; None where there is none.
        output_version: that object's version.
        error: why the shard couldn't be read at last; None where it could.
        failed_version: the version of it that couldn't be read; None where that was the storage's fault,
            and the next run is to try again.
        gone: whether the input no longer has it.
        run: the run that labelled it; None where that was found out from its prediction file.
        committed_at: when (UTC); None likewise.
        statistics: partial class statistics, packed; None in a large manifest.
    """

    uri: str
    version: str | None = None
    format: str | None = None
    size: int | None = None
    rows: int | None = None
    errors: int | None = None
    duplicate_keys: int | None = None
    output: str | None = None
    output_version: str | None = None
    error: str | None = None
    failed_version: str | None = None
    gone: bool = False
    run: str | None = None
    committed_at: datetime | None = None
    statistics: bytes | None = None


_ENTRY_FIELDS = (
    "uri", "version", "errors", "output", "output_version", "error", "failed_version", "gone", "format",
)  # fmt: skip


class Manifest:
    """The manifest of a partition, as it lies in storage.

    Attributes:
        uri: where it lies.
    """

    def __init__(self, storage: Storage, partition: str, num_classes: int) -> None:
        self.uri = f"{partition}/manifest.parquet"
        self._storage = storage
        self._partition = partition
        self._num_classes = num_classes

    def exists(self) -> bool:
        """Whether there is one."""
        return self._version() != ABSENT

    def read(self, columns: Collection[str]) -> pa.Table:
        """Some columns of all rows, sorted by URI; none where there is no manifest yet.

        Raises:
            StorageError: the object is there, but can't be read, or is no manifest.
        """
        tables = [table.select(list(columns)) for table in self._tables(self._version(), columns)]
        empty = pa.schema([_SCHEMA.field(name) for name in columns]).empty_table()
        return pa.concat_tables([empty, *tables])

    def labelled(self, columns: Collection[str], run: str | None = None) -> Iterator[pa.Table]:
        """Some columns of the shards that have labels, or of those that one run labelled. Streams."""
        for table in self._tables(self._version(), {*columns, "output", "run"}):
            table = table.filter(pc.is_valid(table["output"]))
            if run is not None:
                table = table.filter(pc.equal(table["run"], run))
            yield table.select(list(columns))

    def entries(self) -> dict[str, ManifestRow]:
        """Every shard's row by URI, with the fields that planning needs; the others are None."""
        table = self.read(_ENTRY_FIELDS)
        # Few values, repeated in every row: one object each.
        shared = {"format", "error", "failed_version"}
        columns = [
            (column.dictionary_encode() if name in shared else column).to_pylist()
            for name, column in zip(_ENTRY_FIELDS, table.columns, strict=True)
        ]
        rows = (
            ManifestRow(**dict(zip(_ENTRY_FIELDS, values, strict=True)))
            for values in zip(*columns, strict=True)
        )
        return {row.uri: row for row in rows}

    def rows(self) -> Iterator[ManifestRow]:
        """All rows, sorted by URI. Streams."""
        for table in self._tables(self._version(), None):
            yield from map(_to_row, table.to_pylist())

    def update(
        self,
        rows: Mapping[str, ManifestRow],
        removed: Collection[str] = (),
        gone: Mapping[str, bool] | None = None,
        cured: Collection[str] = (),
    ) -> None:
        """Puts rows in the place of those of the same shards, and takes others out; keeps all the rest.

        A row that only says that a shard couldn't be read leaves the labels of an earlier version of it
        standing. Of two writers at once, the later adds to what the earlier has written.

        Args:
            rows: by URI.
            removed: URIs of rows that are to go.
            gone: by URI, whether the input has lost the shard; rows not named keep what they say.
            cured: URIs of rows whose `error` and `failed_version` no longer hold.
        """
        gone = gone or {}
        rows = {uri: replace(row, gone=gone.get(uri, row.gone)) for uri, row in rows.items()}
        while True:
            version = self._version()
            try:
                self._write(self._merged(version, rows, removed, gone, cured), version)
            except ObjectChanged:
                continue
            return

    def replace(self, make_rows: Callable[[], Iterable[ManifestRow]]) -> None:
        """Writes all rows anew, and again if somebody else has written meanwhile; they come sorted by URI."""
        while True:
            version = self._version()
            try:
                self._write(map(_to_table, _batched(make_rows(), ROW_GROUP_ROWS)), version)
            except ObjectChanged:
                continue
            return

    def runs(self, root: str | None = None) -> list[str]:
        """The runs of which labels stand, the first first; with a root, of shards that lie there alone.

        Raises:
            StorageError: the manifest can't be read.
        """
        found: set[str] = set()
        for table in self.labelled(("uri", "run")):
            found.update(pc.unique(_below(table, root)["run"]).drop_null().to_pylist())
        return sorted(found)

    def fold_statistics(self, run: str | None = None) -> ClassStatistics:
        """The class statistics over every labelled shard, or over those that one run has labelled."""
        total = ClassStatistics.empty(self._num_classes)
        for rows in self._partials(self.labelled(("uri", "output", "run", "statistics"), run)):
            total.add_partial(pa.concat_tables([partial for _, _, partial in rows]))
        return total

    def fold_runs(self, root: str | None, *groups: Collection[str]) -> list[ClassStatistics]:
        """The class statistics over every labelled shard; and over what each group of runs has labelled, with
        a root of shards that lie there alone. In one pass.
        """
        total, *totals = (ClassStatistics.empty(self._num_classes) for _ in range(1 + len(groups)))
        for rows in self._partials(self.labelled(("uri", "output", "run", "statistics"))):
            total.add_partial(pa.concat_tables([partial for _, _, partial in rows]))
            for group, part in zip(groups, totals, strict=True):
                own = [
                    partial
                    for uri, run, partial in rows
                    if run in group and (root is None or lies_in(uri, root))
                ]
                if own:
                    part.add_partial(pa.concat_tables(own))
        return [total, *totals]

    def _partials(self, tables: Iterable[pa.Table]) -> Iterator[list[tuple[str, str | None, pa.Table]]]:
        """URI, run and partial statistics of labelled shards, a bounded number at a time."""
        slices = (
            each.slice(i, ROW_GROUP_ROWS) for each in tables for i in range(0, len(each), ROW_GROUP_ROWS)
        )
        with ThreadPoolExecutor(_READERS, thread_name_prefix="footer") as pool:
            for table in slices:
                without = table.filter(pc.is_null(table["statistics"]))["output"].to_pylist()
                read = iter(pool.map(self._partial_of, without))
                packed = table["statistics"].to_pylist()
                partials = [next(read) if data is None else unpack_partial(data) for data in packed]
                uris, runs = table["uri"].to_pylist(), table["run"].to_pylist()
                yield list(zip(uris, runs, partials, strict=True))

    def _partial_of(self, output: str) -> pa.Table:
        uri = f"{self._partition}/{output}"
        with self._storage.open(uri) as file:
            return read_footer(uri, file).partial

    def _version(self) -> str:
        try:
            return self._storage.stat(self.uri).version
        except BucketNotFound:
            raise
        except ObjectNotFound:
            return ABSENT

    def _tables(self, version: str, columns: Collection[str] | None) -> Iterator[pa.Table]:
        """The rows of one version, a row group at a time."""
        if version == ABSENT:
            return
        with self._errors(), self._storage.open_raw(self.uri, version) as stream:
            file = pq.ParquetFile(stream, pre_buffer=True)
            missing = sorted(set(_SCHEMA.names) - set(file.schema_arrow.names))
            if missing:
                raise StorageError(
                    self.uri,
                    f"not a manifest: it has no column {', '.join(missing)} (stats --rebuild makes it anew)",
                )
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=list(columns or _SCHEMA.names))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowInvalid, ValueError, KeyError) as error:
            raise StorageError(self.uri, f"not a manifest: {error}") from None

    def _merged(
        self,
        version: str,
        rows: Mapping[str, ManifestRow],
        removed: Collection[str],
        gone: Mapping[str, bool],
        cured: Collection[str],
    ) -> Iterator[pa.Table]:
        """What `version` becomes with these changes: a merge of two sorted streams."""
        waiting = sorted(rows)
        lost, found = ([uri for uri, value in gone.items() if value is flag] for flag in (True, False))
        marks: list[tuple[str, list[str], bool | None]] = [("gone", lost, True), ("gone", found, False)]
        marks += [(name, list(cured), None) for name in ("error", "failed_version")]
        changes = [(name, pa.array(uris, pa.string()), value) for name, uris, value in marks if uris]
        for table in self._tables(version, None):
            last = table["uri"][-1].as_py()
            count = bisect.bisect_right(waiting, last)
            now, waiting = waiting[:count], waiting[count:]
            changed = [*now, *removed]
            if changed:
                is_changed = pc.is_in(table["uri"], value_set=pa.array(changed, pa.string()))
                before = {row["uri"]: _to_row(row) for row in table.filter(is_changed).to_pylist()}
                added = _to_table([_succeeded(before.get(uri), rows[uri]) for uri in now])
                table = pa.concat_tables([table.filter(pc.invert(is_changed)), added]).sort_by("uri")
            for name, uris, value in changes:
                field = _SCHEMA.field(name)
                is_named = pc.is_in(table["uri"], value_set=uris)
                column = pc.if_else(is_named, pa.scalar(value, field.type), table[name])
                table = table.set_column(_SCHEMA.get_field_index(name), field, column)
            yield table
        yield _to_table([rows[uri] for uri in waiting])

    def _write(self, tables: Iterable[pa.Table], expected: str | None) -> None:
        with tempfile.TemporaryFile() as whole:
            labelled = _save(tables, whole, ROW_GROUP_ROWS)
            if labelled * (self._num_classes + 100) > MOST_STATISTICS:
                with tempfile.TemporaryFile() as less:
                    groups = pq.ParquetFile(whole)
                    rest = (groups.read_row_group(i) for i in range(groups.num_row_groups))
                    _save(map(_without_statistics, rest), less, BARE_ROW_GROUP_ROWS)
                    self._storage.write(self.uri, less, expected)
            else:
                self._storage.write(self.uri, whole, expected)


def _below(table: pa.Table, root: str | None) -> pa.Table:
    if root is None:
        return table
    uris = table["uri"]
    return table.filter(pc.or_(pc.equal(uris, root), pc.starts_with(uris, f"{root}/")))


def _without_statistics(table: pa.Table) -> pa.Table:
    column = _SCHEMA.get_field_index("statistics")
    return table.set_column(column, "statistics", pa.nulls(table.num_rows, pa.binary()))


def _save(tables: Iterable[pa.Table], file: BinaryIO, group_rows: int) -> int:
    """Writes rows in groups of one size, so that the same rows make the same bytes; counts the labelled."""
    labelled = 0
    left = _SCHEMA.empty_table()
    with pq.ParquetWriter(file, _SCHEMA, compression="zstd") as writer:
        for table in tables:
            labelled += table.num_rows - table["output"].null_count
            left = pa.concat_tables([left, table.cast(_SCHEMA)])
            while left.num_rows >= group_rows:
                writer.write_table(left.slice(0, group_rows).combine_chunks())
                left = left.slice(group_rows)
        if left.num_rows:
            writer.write_table(left.combine_chunks())
    return labelled


def _succeeded(before: ManifestRow | None, row: ManifestRow) -> ManifestRow:
    if before is None or before.output is None or row.output is not None:
        return row
    # Its labels of an earlier version are still there, and so are their statistics.
    return replace(before, error=row.error, failed_version=row.failed_version, gone=row.gone)


def _to_table(rows: list[ManifestRow]) -> pa.Table:
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in _SCHEMA]
    return pa.table(columns, schema=_SCHEMA)


def _batched(rows: Iterable[ManifestRow], size: int) -> Iterator[list[ManifestRow]]:
    left = iter(rows)
    while batch := list(islice(left, size)):
        yield batch


_ROW_FIELDS = [field.name for field in fields(ManifestRow)]


def _to_row(record: Mapping[str, object]) -> ManifestRow:
    return ManifestRow(**{name: record[name] for name in _ROW_FIELDS})  # type: ignore[arg-type]


def labelled_row(footer: Footer, output: str, output_version: str) -> ManifestRow:
    """The manifest row of a prediction file, but for the run that wrote it."""
    return ManifestRow(
        uri=footer.shard,
        version=footer.version,
        format=footer.format,
        size=footer.size,
        rows=footer.rows,
        errors=footer.errors,
        duplicate_keys=footer.duplicate_keys,
        output=output,
        output_version=output_version,
        statistics=pack_partial(footer.partial),
    )
