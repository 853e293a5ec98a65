"""Consumer tables: what a partition's prediction files hold, in few large files, kept up to date.

A prediction file is the unit of commit, and so there are as many as shards; who queries all of them is
better served by large ones. Publishing brings a table in line with the manifest, and takes of it only what
is new, has changed or is gone. Both formats, `parquet_table` and `delta_table`, share what is here, and
differ in how a version becomes the current one.

The order of a publication:
 1. the current version of the table is read, and compared with the manifest;
 2. data files are written, under names that no other attempt has: readers don't know of them;
 3. one conditional write makes the next version the current one, if no other publisher was faster: then
    it begins anew, from what that one has published;
 4. what earlier attempts and versions have left behind is removed.
"""

from __future__ import annotations

import secrets
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.commit import Partition, prediction_files
from pipeline.predictions import ROW_GROUP_ROWS, prediction_schema
from pipeline.storage import BucketNotFound, ObjectChanged, ObjectNotFound, Storage, StorageError

#: Bytes of rows in memory that make one file. As Parquet that is a third of it; with embeddings, most of it.
FILE_BYTES = 512 * 1024**2

#: Files with less than this share of that many bytes are written anew, together with what is added.
_SMALL = 1 / 12

_ATTEMPTS = 5

_READERS = 8


_LABELLED = pa.schema(
    [pa.field("uri", pa.string(), nullable=False), ("output", pa.string()), ("output_version", pa.string())]
)


T = TypeVar("T")

R = TypeVar("R")


class TableChangedError(Exception):
    """Another publisher was faster: the table is no longer the version that was read."""


class TableBusyError(RuntimeError):
    """Table or labels changed again and again while they were read; the message says which."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file of a table; it is never changed.

    Attributes:
        path: relative to the table.
        rows, bytes: its size.
        first_shard, last_shard: the least and the greatest of its rows' shards; None where that isn't known.
    """

    path: str
    rows: int
    bytes: int
    first_shard: str | None
    last_shard: str | None


#: A row a shard in a table, sorted: the version of its prediction file that was published, its rows, the
#: version of the table that brought them, and the partition that they are from; that is null where it was
#: not noted. As Arrow, since a million of them as objects are a gigabyte.
SHARDS = pa.schema(
    [
        ("shard", pa.string()),
        ("output_version", pa.string()),
        ("rows", pa.int64()),
        ("published", pa.int64()),
        ("source", pa.string()),
    ]
)


#: In the place of the version of a prediction file, of which no file is: the rows are counted, and not those
#: that were published. So the shard's partition publishes it anew, in the place of what is there.
COUNTED = ""


@dataclass(frozen=True)
class Snapshot:
    """A version of a table, as far as one model's rows are concerned.

    Attributes:
        version: counts up from 1; 0 before anything is published.
        token: tells attempts at the same version apart.
        columns: names and types.
        files: what it consists of.
        shards: what it holds, as `SHARDS`.
    """

    version: int
    token: str
    columns: tuple[str, ...] = ()
    files: tuple[DataFile, ...] = ()
    shards: pa.Table = field(default_factory=SHARDS.empty_table)

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return pc.sum(self.shards["rows"]).as_py() or 0


#: What there is before anything is published.
NOTHING = Snapshot(0, "")


class ConsumerTable(Protocol):
    """Where rows are published: how a version is read and made."""

    #: What the paths of data files are relative to.
    uri: str

    def read(self) -> Snapshot:
        """The current version; `NOTHING` before there is one."""

    def schema(self, predictions: pa.Schema) -> pa.Schema:
        """The columns as the format can hold them."""

    def data_path(self, name: str) -> str:
        """Where a data file goes, relative to the table."""

    def commit(self, base: Snapshot, snapshot: Snapshot) -> None:
        """Makes `snapshot` the current version in the place of `base`, the one that was read last.

        Raises:
            TableChangedError: the current version is another one.
            StorageError: it can't be written.
        """

    def tidy(self, snapshot: Snapshot) -> None:
        """Removes what is no longer needed now that this is the current version."""


@dataclass(frozen=True)
class Increment:
    """What a table lacks.

    Attributes:
        added: shards to publish, sorted: `uri`, and their prediction files, `output` (relative to the
            partition) and `output_version`.
        replaced: those of them that the table has in an earlier version.
        removed: shards that the table has from this partition, and that are no longer labelled.
        pending: shards whose file has changed since the manifest was written: they stay as they are.
    """

    added: pa.Table
    replaced: pa.ChunkedArray
    removed: pa.ChunkedArray
    pending: pa.ChunkedArray


@dataclass(frozen=True)
class Publication:
    """What came of publishing.

    Attributes:
        snapshot: the version of the table that is current now.
        increment: what it brought.
        is_new: whether it was made; else there was nothing to do.
    """

    snapshot: Snapshot
    increment: Increment
    is_new: bool


def publish(
    partition: Partition, table: ConsumerTable, *, embedding: bool = True, file_bytes: int = FILE_BYTES
) -> Publication:
    """Brings a table in line with the manifest of a partition.

    It may hold rows of other partitions of the model, of other datasets that is: these stay as they are.

    Args:
        partition: whose predictions are published.
        table: where.
        embedding: whether embeddings are published too, where there are any.
        file_bytes: bytes of rows in memory that make one file; memory is about three times that.

    Raises:
        TableBusyError: other publishers, or a run, were faster each time.
        StorageError: something can't be read or written; or the table has a shard from another partition, or
            other columns of one.
    """
    schema = table.schema(_published_schema(partition, embedding))
    schema = schema.append(pa.field("published", pa.int64()))
    cause: Exception | None = None
    for _ in range(_ATTEMPTS):
        base = table.read()
        labelled = _labelled(partition)  # after it: what others have published meanwhile is labelled, too
        base = _adopted(base, labelled, partition.uri)
        _check_others(table.uri, base, labelled, partition.uri, columns_of(schema))
        increment = _increment(partition, labelled, base, columns_of(schema))
        if not (len(increment.added) or len(increment.removed)):
            table.tidy(base)
            return Publication(base, increment, is_new=False)
        try:
            snapshot = _Writer(partition, table, schema, file_bytes, base).write(increment)
            table.commit(base, snapshot)
        except TableChangedError as error:
            cause = error
            continue
        except BucketNotFound:
            raise
        except (ObjectChanged, ObjectNotFound) as error:  # by a run; or by a publisher that has tidied up
            if not error.uri.startswith(f"{partition.uri}/") and table.read().token == base.token:
                raise
            cause = error
            continue
        table.tidy(snapshot)
        return Publication(snapshot, increment, is_new=True)
    raise TableBusyError(f"{table.uri}: not published, since others were faster {_ATTEMPTS} times: {cause}")


def _published_schema(partition: Partition, embedding: bool) -> pa.Schema:
    """The columns of the partition's prediction files, with their embeddings where these are asked for."""
    outputs = (output for table in partition.manifest.labelled(["output"]) for output in table["output"])
    first = next(outputs, None)
    if first is None or not embedding:
        return prediction_schema()
    with partition.storage.open(f"{partition.uri}/{first}") as file:
        schema = pq.read_schema(file)
    if "embedding" not in schema.names:
        return prediction_schema()
    kind = schema.field("embedding").type
    return prediction_schema("float16" if kind.value_type == pa.float16() else "float32", kind.list_size)


def columns_of(schema: pa.Schema) -> tuple[str, ...]:
    """Names and types, as `Snapshot` has them."""
    return tuple(f"{column.name} {column.type}" for column in schema)


def _labelled(partition: Partition) -> pa.Table:
    tables = partition.manifest.labelled(_LABELLED.names)
    return pa.concat_tables([_LABELLED.empty_table(), *tables])


def _adopted(base: Snapshot, labelled: pa.Table, source: str) -> Snapshot:
    """Notes as this partition's what it has labelled, of the shards that are from nobody knows where.

    If it is one that was published, so are all those that were: the table is from before sources were noted,
    when it could have one partition only. What was counted may be of several.
    """
    shards = base.shards
    is_unknown = pc.is_null(shards["source"])
    if not pc.any(is_unknown).as_py():
        return base
    is_own = pc.and_(is_unknown, pc.is_in(shards["shard"], value_set=labelled["uri"]))
    is_noted = pc.and_(is_unknown, pc.not_equal(shards["output_version"], COUNTED))
    if pc.any(pc.and_(is_own, is_noted)).as_py():
        is_own = pc.or_(is_own, is_noted)
    place = SHARDS.get_field_index("source")
    sources = pc.if_else(is_own, source, shards["source"])
    return replace(base, shards=shards.set_column(place, SHARDS.field(place), sources))


def _check_others(
    table: str, base: Snapshot, labelled: pa.Table, source: str, columns: tuple[str, ...]
) -> None:
    """Refuses what would do harm to rows of other partitions, which can't be made anew from this one."""
    others = base.shards.filter(pc.fill_null(pc.not_equal(base.shards["source"], source), True))
    if not len(others):
        return
    twice = others.filter(pc.is_in(others["shard"], value_set=labelled["uri"]))
    if len(twice):
        [shard], [other] = twice["shard"][:1].to_pylist(), twice["source"][:1].to_pylist()
        cause = f"has the shard {shard} from {other} already: {source} needs a table of its own"
        raise StorageError(table, cause)
    if base.columns != columns:
        other = others["source"][0].as_py() or "another dataset"
        cause = (
            f"has rows of {other} in other columns: publish {source} with or without embeddings as that, "
            "or into a table of its own"
        )
        raise StorageError(table, cause)


def _increment(
    partition: Partition, labelled: pa.Table, base: Snapshot, columns: tuple[str, ...]
) -> Increment:
    """Compares the manifest with what is published."""
    known = base.shards["shard"]
    is_own = pc.fill_null(pc.equal(base.shards["source"], partition.uri), False)
    removed = known.filter(pc.and_(is_own, pc.invert(pc.is_in(known, value_set=labelled["uri"]))))
    place = pc.index_in(labelled["uri"], value_set=known)
    added = labelled.append_column("is_known", pc.is_valid(place))
    if same_columns := base.columns == columns:
        published = base.shards["output_version"].take(place)
        is_same = pc.fill_null(pc.equal(labelled["output_version"], published), False)
        added = added.filter(pc.invert(is_same))
    is_there = _are_there(partition, added)
    pending, added = added.filter(pc.invert(is_there)), added.filter(is_there)
    if len(added) and not same_columns:  # then no row can be taken over
        removed = _concatenated(removed, pending.filter(pending["is_known"])["uri"])
    replaced = added.filter(added["is_known"])["uri"]
    return Increment(added.select(_LABELLED.names), replaced, removed, pending["uri"])


def _are_there(partition: Partition, shards: pa.Table) -> pa.Array:
    """Of each shard, whether its prediction file is there in the version that the manifest says.

    By hashes, which are a tenth of the names. If two were the same, a file would be tried to be read in a
    version that isn't there, and that fails.
    """
    if not len(shards):
        return pa.array([], pa.bool_())
    files = prediction_files(partition.storage, partition.uri)
    found = np.fromiter((hash((info.uri, info.version)) for info in files), np.int64)
    wanted = (
        hash((f"{partition.uri}/{output}", version))
        for _, output, version in _rows(shards.select(_LABELLED.names))
    )
    return pa.array(np.isin(np.fromiter(wanted, np.int64, len(shards)), found))


def _rows(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """The rows as tuples, a few thousand of them at once."""
    for batch in table.to_batches(max_chunksize=10_000):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _concatenated(*columns: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())


class _Writer:
    """Writes the data files of one attempt at the next version."""

    def __init__(
        self, partition: Partition, table: ConsumerTable, schema: pa.Schema, file_bytes: int, base: Snapshot
    ) -> None:
        self._storage = partition.storage
        self._partition = partition.uri
        self._table = table
        self._schema = schema
        self._file_bytes = file_bytes
        self._base = base
        self._version = base.version + 1
        self._token = secrets.token_hex(4)
        self._files: list[DataFile] = []

    def write(self, increment: Increment) -> Snapshot:
        """Writes them; returns the version that they make."""
        gone = _concatenated(increment.replaced, increment.removed)
        stay, go = self._split(gone)
        rows_of = np.zeros(len(increment.added), np.int64)
        units = self._units(increment.added, rows_of, go, gone)
        try:
            for rows in _packed(units, self._file_bytes):
                self._write_file(rows)
            if not self._files and not stay:  # never none: then a reader would not know the columns
                self._write_file(self._schema.empty_table())
        except BaseException:
            for file in self._files:
                with suppress(StorageError):  # it would hide what went wrong; the next publication tidies up
                    self._storage.delete(f"{self._table.uri}/{file.path}")
            raise
        files = (*stay, *self._files)
        shards = self._shards(increment.added, rows_of, gone)
        return Snapshot(self._version, self._token, columns_of(self._schema), files, shards)

    def _shards(self, added: pa.Table, rows_of: np.ndarray, gone: pa.ChunkedArray) -> pa.Table:
        """What the version holds."""
        base, version = self._base.shards, pa.array(np.full(len(added), self._version))
        stay = base.filter(pc.invert(pc.is_in(base["shard"], value_set=gone)))
        source = pa.repeat(self._partition, len(added))
        columns = [added["uri"], added["output_version"], pa.array(rows_of), version, source]
        return pa.concat_tables([stay, pa.table(columns, schema=SHARDS)]).sort_by("shard")

    def _split(self, gone: pa.ChunkedArray) -> tuple[list[DataFile], list[DataFile]]:
        """The files of the base that stay, and those whose rows are taken over into new ones."""
        if len(gone) == len(self._base.shards):
            return [], []
        go = [file for file in self._base.files if self._is_small(file) or self._has_any(file, gone)]
        return [file for file in self._base.files if file not in go], go

    def _is_small(self, file: DataFile) -> bool:
        return file.bytes < self._file_bytes * _SMALL

    def _has_any(self, file: DataFile, gone: pa.ChunkedArray) -> bool:
        """Whether a file has rows of these shards; most are known not to by their range of shards."""
        if file.first_shard is not None and file.last_shard is not None:
            is_within = pc.and_(
                pc.greater_equal(gone, file.first_shard), pc.less_equal(gone, file.last_shard)
            )
            if not pc.any(is_within).as_py():
                return False
        shards = _read(
            self._storage, f"{self._table.uri}/{file.path}", None, pa.schema([self._schema.field("shard")])
        )["shard"]
        return bool(pc.any(pc.is_in(shards, value_set=gone)).as_py())

    def _units(
        self, added: pa.Table, rows_of: np.ndarray, go: Iterable[DataFile], gone: pa.ChunkedArray
    ) -> Iterator[pa.Table]:
        """The rows to write: a shard's, or those that a file still has; shards in their order.

        Notes in `rows_of` how many each of the added shards has.
        """
        for file in go:
            rows = _read(self._storage, f"{self._table.uri}/{file.path}", None, self._schema)
            yield rows.filter(pc.invert(pc.is_in(rows["shard"], value_set=gone)))

        predictions = self._schema.remove(len(self._schema) - 1)

        def read(numbered: tuple[int, tuple[str, str, str]]) -> pa.Table:
            number, (_, output, version) = numbered
            rows = _read(self._storage, f"{self._partition}/{output}", version, predictions)
            rows_of[number] = rows.num_rows
            published = pa.array(np.full(rows.num_rows, self._version), pa.int64())
            return rows.append_column("published", published).cast(self._schema)

        yield from ahead(read, enumerate(_rows(added)))

    def _write_file(self, rows: pa.Table) -> None:
        path = self._table.data_path(f"{self._version:08d}-{self._token}-{len(self._files):04d}.parquet")
        shards = pc.min_max(rows["shard"]).as_py()
        with tempfile.TemporaryFile() as file:
            _encode(rows, file)
            size = file.tell()
            self._storage.write(f"{self._table.uri}/{path}", file)
        self._files.append(DataFile(path, rows.num_rows, size, shards["min"], shards["max"]))


def _read(storage: Storage, uri: str, version: str | None, schema: pa.Schema) -> pa.Table:
    """Some columns of a file, as these types: who rewrites a table may choose others, such as views."""
    try:
        with storage.open(uri, version) as file:
            return pq.ParquetFile(file).read(columns=schema.names).select(schema.names).cast(schema)
    except (pa.ArrowInvalid, KeyError) as error:
        raise StorageError(uri, f"not a file of predictions: {error}") from None


def ahead(action: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What `action` makes of the items, in their order, a few of them ahead."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="publish") as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(action, item))
                if len(waiting) > _READERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _packed(units: Iterable[pa.Table], file_bytes: int) -> Iterator[pa.Table]:
    """The rows of one file after the other: as many units as fit, at least one, sorted."""
    held: list[pa.Table] = []
    size = 0
    for unit in units:
        if not unit.num_rows:
            continue
        if held and size + unit.nbytes > file_bytes:
            yield _sorted(held)
            held, size = [], 0
        held.append(unit)
        size += unit.nbytes
    if held:
        yield _sorted(held)


#: By class, and within it the least certain first: a filter on label, or on label and score, reads a few row
#: groups of each file. The rest only makes the order a total one.
_ORDER = ("label", "score", "shard", "index")


def _sorted(units: list[pa.Table]) -> pa.Table:
    rows = pa.concat_tables(units)
    units.clear()
    keys = rows.select(list(_ORDER)).combine_chunks()
    order = pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in _ORDER])
    return rows.take(order)


def _encode(rows: pa.Table, file: BinaryIO) -> None:
    with pq.ParquetWriter(
        file,
        rows.schema,
        compression="zstd",
        use_dictionary=["shard", "label", "error"],
        write_page_index=True,
        # For one image by its key: sorted by class, a row group's range of keys tells nothing.
        bloom_filter_options={"key": {"ndv": max(1, min(rows.num_rows, ROW_GROUP_ROWS)), "fpp": 0.01}},
        sorting_columns=pq.SortingColumn.from_ordering(
            rows.schema, [(name, "ascending") for name in _ORDER], null_placement="at_end"
        ),
    ) as writer:
        writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)
