"""The manifest: one row per labeled shard, and the per-class statistics folded from the rows.

It is a fold over the prediction files, which `recovery` can repeat. It is rewritten as a stream, in one
conditional PUT, so that neither concurrent writers nor its size do harm.
"""

from __future__ import annotations

import bisect
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.predictions import Footer, pack_partial, read_footer, unpack_partial
from pipeline.statistics import ClassStatistics
from pipeline.storage import ABSENT, Storage, StorageError, lies_in

T = TypeVar("T")
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
    """What is known of a shard.

    Attributes:
        uri: the shard.
        version: its version that is labeled; None where none is.
        format, size: of the shard, when it was last read.
        rows: its samples; None where none is labeled.
        errors: samples that are error rows.
        duplicate_keys: samples whose key an earlier sample of the shard has.
        output, output_version: its prediction file, relative to the partition; None where there is none.
        error: why the shard couldn't be read last time; None where it could.
        failed_version: the version that couldn't be read; None where the storage failed, and the next run
            is to read the shard again.
        gone: whether the shard was deleted from the input.
        run: the run that labeled it; None where the row was recovered from the prediction file.
        committed_at: when (UTC); None where `run` is.
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

    @classmethod
    def of_file(cls, footer: Footer, output: str, output_version: str) -> ManifestRow:
        """Makes the row of a prediction file, without the run that wrote it."""
        return cls(
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

    def succeeding(self, before: ManifestRow | None) -> ManifestRow:
        """The row that replaces an earlier one: a failure keeps the labels of an earlier version."""
        if before is None or before.output is None or self.output is not None:
            return self
        return replace(before, error=self.error, failed_version=self.failed_version, gone=self.gone)


_ENTRY_FIELDS = (
    "uri", "version", "errors", "output", "output_version", "error", "failed_version", "gone", "format",
)  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """The stored manifest of a partition.

    Attributes:
        partition: URI of the partition.
        num_classes: of its model.
        group_rows: rows of a row group with statistics (some 50 MB): what is in memory during a rewrite.
        bare_group_rows: rows of a row group without statistics (some 10 MB).
        max_statistics: shards times (classes + 100) up to which rows hold their statistics (some 500 MB).
            In a larger manifest that column is null, and statistics are folded from the files' footers.
    """

    storage: Storage
    partition: str
    num_classes: int
    group_rows: int = 2000
    bare_group_rows: int = 50_000
    max_statistics: int = 17_000_000

    @property
    def uri(self) -> str:
        """URI of the object."""
        return f"{self.partition}/manifest.parquet"

    def exists(self) -> bool:
        """Whether the manifest exists."""
        return self.storage.version(self.uri) != ABSENT

    def read(self, columns: Collection[str]) -> pa.Table:
        """Returns some columns of all rows, sorted by URI; no rows where there is no manifest yet.

        Raises:
            StorageError: the object can't be read, or is no manifest.
        """
        tables = [table.select(list(columns)) for table in self._tables(columns)]
        empty = pa.schema([_SCHEMA.field(name) for name in columns]).empty_table()
        return pa.concat_tables([empty, *tables])

    def labelled(self, columns: Collection[str], run: str | None = None) -> Iterator[pa.Table]:
        """Yields some columns of the shards that have labels, or of those that one run labeled."""
        for table in self._tables({*columns, "output", "run"}):
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
        """Yields all rows, sorted by URI."""
        for table in self._tables():
            yield from (ManifestRow(**row) for row in table.to_pylist())

    def update(
        self,
        rows: Mapping[str, ManifestRow],
        removed: Collection[str] = (),
        gone: Mapping[str, bool] | None = None,
        cured: Collection[str] = (),
    ) -> None:
        """Replaces or adds some rows, removes others, and keeps the rest.

        A row that only reports a read failure keeps the labels of an earlier version of its shard. Of two
        concurrent writers, the later one adds to what the earlier one wrote.

        `gone` says of some URIs whether the shard was deleted from the input. In the rows of `cured` URIs,
        `error` and `failed_version` no longer hold.
        """
        gone = gone or {}
        rows = {uri: replace(row, gone=gone.get(uri, row.gone)) for uri, row in rows.items()}
        deleted, present = ([uri for uri, value in gone.items() if value is flag] for flag in (True, False))
        marks: list[tuple[str, Collection[str], bool | None]] = [("gone", deleted, True)]
        marks += [("gone", present, False), ("error", cured, None), ("failed_version", cured, None)]
        self._rewrite(lambda version: _merged(self._tables(version=version), rows, removed, marks))

    def replace(self, make_rows: Callable[[], Iterable[ManifestRow]]) -> None:
        """Rewrites all rows, sorted by URI; calls `make_rows` again if somebody else wrote meanwhile."""
        self._rewrite(lambda _: map(_to_table, batched(make_rows(), self.group_rows)))

    def runs(self, root: str | None = None) -> list[str]:
        """Returns the runs that current labels are from, the first one first.

        With a root, only of shards under that URI.

        Raises:
            StorageError: the manifest can't be read.
        """
        found: set[str] = set()
        for table in self.labelled(("uri", "run")):
            if root is not None:
                uris = table["uri"]
                table = table.filter(pc.or_(pc.equal(uris, root), pc.starts_with(uris, f"{root}/")))
            found.update(pc.unique(table["run"]).drop_null().to_pylist())
        return sorted(found)

    def fold_statistics(self, run: str | None = None) -> ClassStatistics:
        """Folds the class statistics over every labeled shard, or over those that one run labeled."""
        return self.fold_runs(None, run=run)[0]

    def fold_runs(
        self, root: str | None, *groups: Collection[str], run: str | None = None
    ) -> list[ClassStatistics]:
        """Folds the class statistics over every labeled shard, and over what each group of runs labeled.

        With a root, the groups' statistics are of shards under that URI only; with a run, only what that run
        labeled counts. Reads the manifest once.
        """
        total, *totals = (ClassStatistics.empty(self.num_classes) for _ in range(1 + len(groups)))
        for rows in self._partials(self.labelled(("uri", "output", "run", "statistics"), run)):
            total.add_partial(pa.concat_tables([partial for _, _, partial in rows]))
            rows = [row for row in rows if root is None or lies_in(row[0], root)]
            for group, part in zip(groups, totals, strict=True):
                if own := [partial for _, run, partial in rows if run in group]:
                    part.add_partial(pa.concat_tables(own))
        return [total, *totals]

    def _partials(self, tables: Iterable[pa.Table]) -> Iterator[list[tuple[str, str | None, pa.Table]]]:
        """Yields URI, run and partial statistics of labeled shards, a bounded number at a time."""
        size = self.group_rows
        slices = (each.slice(i, size) for each in tables for i in range(0, len(each), size))
        with ThreadPoolExecutor(_READERS, thread_name_prefix="footer") as pool:
            for table in slices:
                without = table.filter(pc.is_null(table["statistics"]))["output"].to_pylist()
                read = iter(pool.map(self._partial_of, without))
                packed = table["statistics"].to_pylist()
                partials = [next(read) if data is None else unpack_partial(data) for data in packed]
                uris, runs = table["uri"].to_pylist(), table["run"].to_pylist()
                yield list(zip(uris, runs, partials, strict=True))

    def _partial_of(self, output: str) -> pa.Table:
        uri = f"{self.partition}/{output}"
        with self.storage.open(uri) as file:
            return read_footer(uri, file).partial

    def _tables(
        self, columns: Collection[str] | None = None, version: str | None = None
    ) -> Iterator[pa.Table]:
        """Yields the rows of one version, or of the current one, a row group at a time."""
        version = self.storage.version(self.uri) if version is None else version
        if version == ABSENT:
            return
        try:
            with self.storage.open_raw(self.uri, version) as stream:
                file = pq.ParquetFile(stream, pre_buffer=True)
                missing = sorted(set(_SCHEMA.names) - set(file.schema_arrow.names))
                if missing:
                    message = f"not a manifest: it has no column {', '.join(missing)} (run stats --rebuild)"
                    raise StorageError(self.uri, message)
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group, columns=list(columns or _SCHEMA.names))
        except (pa.ArrowInvalid, ValueError, KeyError) as error:
            raise StorageError(self.uri, f"not a manifest: {error}") from None

    def _rewrite(self, make_tables: Callable[[str], Iterable[pa.Table]]) -> None:
        with ExitStack() as files:

            def content(version: str) -> BinaryIO:
                files.close()  # of the last attempt
                whole = files.enter_context(tempfile.TemporaryFile())
                labelled = _save(make_tables(version), whole, self.group_rows)
                if labelled * (self.num_classes + 100) <= self.max_statistics:
                    return whole
                bare = files.enter_context(tempfile.TemporaryFile())
                groups = pq.ParquetFile(whole)
                tables = (groups.read_row_group(i) for i in range(groups.num_row_groups))
                _save(map(_without_statistics, tables), bare, self.bare_group_rows)
                return bare

            self.storage.update(self.uri, content)


def _merged(
    tables: Iterable[pa.Table],
    rows: Mapping[str, ManifestRow],
    removed: Collection[str],
    marks: Iterable[tuple[str, Collection[str], bool | None]],
) -> Iterator[pa.Table]:
    """Merges the sorted stream of rows with the changes."""
    waiting = sorted(rows)
    changes = [(name, pa.array(list(uris), pa.string()), value) for name, uris, value in marks if uris]
    for table in tables:
        last = table["uri"][-1].as_py()
        count = bisect.bisect_right(waiting, last)
        now, waiting = waiting[:count], waiting[count:]
        changed = [*now, *removed]
        if changed:
            is_changed = pc.is_in(table["uri"], value_set=pa.array(changed, pa.string()))
            before = {row["uri"]: ManifestRow(**row) for row in table.filter(is_changed).to_pylist()}
            added = _to_table([rows[uri].succeeding(before.get(uri)) for uri in now])
            table = pa.concat_tables([table.filter(pc.invert(is_changed)), added]).sort_by("uri")
        for name, uris, value in changes:
            field = _SCHEMA.field(name)
            is_named = pc.is_in(table["uri"], value_set=uris)
            column = pc.if_else(is_named, pa.scalar(value, field.type), table[name])
            table = table.set_column(_SCHEMA.get_field_index(name), field, column)
        yield table
    yield _to_table([rows[uri] for uri in waiting])


def _without_statistics(table: pa.Table) -> pa.Table:
    column = _SCHEMA.get_field_index("statistics")
    return table.set_column(column, "statistics", pa.nulls(table.num_rows, pa.binary()))


def _save(tables: Iterable[pa.Table], file: BinaryIO, group_rows: int) -> int:
    """Writes rows in groups of one size, so that equal rows give equal bytes; counts the labeled ones."""
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


def _to_table(rows: list[ManifestRow]) -> pa.Table:
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in _SCHEMA]
    return pa.table(columns, schema=_SCHEMA)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Cuts items into lists of at most `size`; itertools has it from Python 3.12 on."""
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch
