"""A consumer table as Delta Lake: one for all models, partitioned by model, one transaction an increment.

The data files are those of any consumer table; `deltalake` only writes the log: files that come and files
that go, in one commit. So no condition over rows is ever put into words, whatever the keys are. A commit
says, as the transaction of an application that is the partition, which version of the partition's rows it
makes: whoever asks for that knows whether an attempt came through, and finds its list of shards,

    <target>/_cvt_label/model=<name>-<fingerprint8>/<version>-<token>.parquet

which was written before it. Delta's own VACUUM removes data files that no version needs; nothing here does.

A Delta table is its owner's: who compacts it, deletes rows, puts an earlier version back or copies it changes
files, and not that list. Where its files are others, the rows of each shard are counted.
"""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.predictions import prediction_schema
from pipeline.publish.publishing import (
    COUNTED,
    NOTHING,
    SHARDS,
    DataFile,
    Snapshot,
    TableChangedError,
    ahead,
    columns_of,
)
from pipeline.storage import BucketNotFound, ObjectNotFound, Storage, StorageError

_TOKEN_BITS = 32

#: How often a commit is tried while others, who don't concern it, are faster.
_COMMITS = 20

_FOOTER = b"cvt_label.table"

#: Characters of what deltalake says of an error.
_LONGEST_MESSAGE = 300

#: Columns whose least and greatest values stand in the log, all that are no lists. Where it has bounds of
#: some columns, deltalake's datasets take one that is missing for a bound that no value meets.
_STATISTICS = (
    *("shard", "key", "index", "label", "label_id", "score", "entropy", "target_id"),
    *("width", "height", "error", "published"),
)

#: Characters of a bound: enough to tell shards apart in one folder.
_LONGEST_BOUND = 256

#: Rows of a shard that are there, and the least and the greatest version of the table that brought them.
_ROWS = pa.schema(
    [
        ("shard", pa.string()),
        ("rows", pa.int64()),
        ("least_published", pa.int64()),
        ("published", pa.int64()),
    ]
)

#: Counts of shards that are held before they are made one.
_AT_ONCE = 100_000


class DeltaTable:
    """One model's rows in a Delta table.

    Attributes:
        uri: where the table lies.
    """

    def __init__(self, storage: Storage, target: str, model: str) -> None:
        """Args:
        storage: access to it.
        target: URI of the Delta table.
        model: the partition's name and the beginning of its fingerprint.

        Raises:
            StorageError: `deltalake` is not installed.
        """
        try:
            import deltalake  # noqa: F401
        except ImportError:
            cause = "Delta tables need the package deltalake: pip install 'cvt-label[delta]'"
            raise StorageError(target, cause) from None
        self.uri = target
        self._storage = storage
        self._model = model
        self._app = f"cvt-label/model={model}"
        self._states = f"{target}/_cvt_label/model={model}"
        # The log has paths percent-encoded, and not every reader decodes them: so nothing is there to encode.
        self._folder = "model=" + re.sub(r"[^A-Za-z0-9._-]", "-", model)
        self._delta: Any = None

    def schema(self, predictions: pa.Schema) -> pa.Schema:
        """The columns as Delta has them: it knows neither half precision nor lists of one length."""
        return pa.schema([_as_delta(column) for column in predictions])

    def data_path(self, name: str) -> str:
        """Where a data file goes."""
        return f"{self._folder}/{name}"

    def read(self) -> Snapshot:
        """The current version.

        Raises:
            StorageError: it can't be read, or is a table that something else has made.
        """
        while True:
            self._load()
            number = self._transaction()
            if number is None:  # a copy of a table may lack it
                if self._delta is None or not (files := tuple(self._files({}))):
                    return NOTHING
                found = self._counted(0, "", files, SHARDS.empty_table())
                return replace(found, version=pc.max(found.shards["published"]).as_py() or 0)
            version, token = number >> _TOKEN_BITS, f"{number % 2**_TOKEN_BITS:08x}"
            try:
                data = self._storage.read(self._state(version, token))
            except ObjectNotFound:
                self._load()
                if self._transaction() != number:  # another publisher has tidied up
                    continue
                return self._counted(version, token, tuple(self._files({})), SHARDS.empty_table())
            return self._snapshot(version, token, pq.read_table(io.BytesIO(data)))

    def _snapshot(self, version: int, token: str, state: pa.Table) -> Snapshot:
        notes = json.loads(state.schema.metadata[_FOOTER])
        ranges = {path: (first, last) for path, first, last in notes["files"]}
        files = tuple(self._files(ranges))
        if "source" not in state.column_names:
            state = state.append_column("source", pa.nulls(len(state), pa.string()))
        if {file.path for file in files} != ranges.keys():
            return self._counted(version, token, files, state.cast(SHARDS))
        return Snapshot(version, token, tuple(notes["columns"]), files, state.cast(SHARDS))

    def _counted(self, version: int, token: str, files: tuple[DataFile, ...], listed: pa.Table) -> Snapshot:
        """A version as its files say, which somebody else has made.

        Args:
            version: of the last publication.
            token: likewise.
            files: what the version consists of.
            listed: the shards that were published, as far as it is known.

        Raises:
            StorageError: a file can't be read, or lacks columns that are published.
        """
        total, waiting = _ROWS.empty_table(), list[pa.Table]()
        for rows in ahead(self._count, files):
            waiting.append(rows)
            if sum(map(len, waiting)) > max(len(total), _AT_ONCE):
                total, waiting = _folded([total, *waiting]), []
        shards = _compared(listed, _folded([total, *waiting]))
        columns = columns_of(self._schema(self._has_embeddings(files)))
        return Snapshot(version, token, columns, files, shards)

    def _count(self, file: DataFile) -> pa.Table:
        """The rows of a file by shard, as `_ROWS`. Streams."""
        uri, total = f"{self.uri}/{file.path}", _ROWS.empty_table()
        try:
            with self._storage.open(uri) as stream:
                for batch in pq.ParquetFile(stream).iter_batches(columns=["shard", "published"]):
                    published = batch["published"]
                    rows = pa.array(np.ones(len(batch), np.int64))
                    values = batch["shard"].cast(pa.string()), rows, published, published
                    total = _folded([total, pa.table(values, schema=_ROWS)])
        except (pa.ArrowInvalid, KeyError) as error:
            raise StorageError(uri, f"not a file of predictions: {error}") from None
        return total

    def _has_embeddings(self, files: Iterable[DataFile]) -> bool:
        """Whether any row has one: who rewrites a table gives all of them the column."""
        for file in files:
            with self._storage.open(f"{self.uri}/{file.path}") as stream:
                found = pq.ParquetFile(stream)
                if "embedding" not in found.schema_arrow.names:
                    continue
                batches = found.iter_batches(1000, columns=["embedding"])
                if any(batch["embedding"].null_count < len(batch) for batch in batches):
                    return True
        return False

    def commit(self, base: Snapshot, snapshot: Snapshot) -> None:
        """Makes a version the current one, in one transaction; see `ConsumerTable`."""
        from deltalake import CommitProperties, Transaction
        from deltalake.exceptions import DeltaError
        from deltalake.transaction import create_table_with_add_actions

        self._storage.write(self._state(snapshot.version, snapshot.token), _state_file(snapshot))
        properties = CommitProperties(
            # Whoever is slower looks what the other has committed: it is not to be added twice.
            max_commit_retries=0,
            app_transactions=[Transaction(self._app, _number(snapshot))],
            custom_metadata={"cvt_label": {"model": self._model, "version": snapshot.version}},
        )
        was, now = ({file.path for file in files} for files in (base.files, snapshot.files))
        added = [self._added(file.path, file.bytes) for file in snapshot.files if file.path not in was]
        removed = [self._removed(file) for file in base.files if file.path not in now]
        options = {"partition_by": ["model"], "commit_properties": properties}
        if self._delta is not None:  # hours may have passed since it was read: with credentials of now
            self._delta = self._opened(self._delta.version())
        for _ in range(_COMMITS):
            try:
                if self._delta is None:
                    create_table_with_add_actions(
                        self.uri, self._table_schema(), added, storage_options=self._options(), **options
                    )
                else:
                    self._delta.create_write_transaction(
                        [*added, *removed], "append", self._table_schema(), **options
                    )
                return
            except (DeltaError, OSError) as error:
                if self._came_through(base, snapshot, error):
                    return
        raise TableChangedError(f"{self.uri}: others committed {_COMMITS} times meanwhile")

    def tidy(self, snapshot: Snapshot) -> None:
        """Removes the lists of shards of earlier versions, and of attempts at this one that have lost.

        And adds to the log what statistics it lacks, as those of tables that were compacted may.
        """
        self._load()
        if self._delta is not None:
            self._complete_statistics()
        self._storage.sweep(self.uri)
        try:
            found = [info.uri for info in self._storage.list(self._states)]
        except ObjectNotFound:
            return
        for uri in found:
            digits = uri.rpartition("/")[2].partition("-")[0]
            is_over = digits.isdecimal() and int(digits) <= snapshot.version
            if is_over and uri != self._state(snapshot.version, snapshot.token):
                self._storage.delete(uri)

    def _came_through(self, base: Snapshot, snapshot: Snapshot, error: Exception) -> bool:
        """What it means that a commit failed.

        Returns:
            whether it was committed all the same, and only its answer was lost; else it can be tried again,
            since what others have committed doesn't concern this model.

        Raises:
            TableChangedError: it does.
            StorageError: nobody has committed anything.
        """
        before = self._delta and self._delta.version()
        self._load()
        if self._transaction() == _number(snapshot):
            return True
        if self._delta is None or self._delta.version() == before:
            raise StorageError(self.uri, f"the transaction was not committed: {_said(error)}") from error
        paths = {file.path for file in self._files({})}
        if self._transaction() != _number(base) or paths != {file.path for file in base.files}:
            raise TableChangedError(f"{self.uri}: another publisher was faster") from error
        return False

    def _load(self) -> None:
        """Opens the table as it is now, if there is one."""
        try:  # so that what can't be reached is told as it is everywhere
            is_there = next(self._storage.list(f"{self.uri}/_delta_log"), None) is not None
        except BucketNotFound:
            raise
        except ObjectNotFound:
            is_there = False
        self._delta = self._opened(None) if is_there else None
        if self._delta is not None:
            self._check()

    def _opened(self, version: int | None) -> Any:
        """The table in one version, or as it is now; None where there is none."""
        import deltalake
        from deltalake.exceptions import DeltaError, TableNotFoundError

        try:
            return deltalake.DeltaTable(self.uri, version=version, storage_options=self._options())
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            raise StorageError(self.uri, f"can't be read as a Delta table: {_said(error)}") from None

    def _options(self) -> dict[str, str] | None:
        """How the storage is reached: as from here, with the credentials of now."""
        if not self.uri.startswith("s3://"):
            return None
        found = self._storage.s3_access()
        options = {
            "endpoint_url": found.endpoint_url,
            "allow_http": "true" if (found.endpoint_url or "").startswith("http://") else None,
            "region": found.region,
            "aws_access_key_id": found.access_key,
            "aws_secret_access_key": found.secret_key,
            "aws_session_token": found.token,
        }
        return {name: value for name, value in options.items() if value}

    def _check(self) -> None:
        """Refuses tables that it could harm."""
        if self._delta.metadata().partition_columns != ["model"]:
            raise StorageError(self.uri, "is a Delta table that is not partitioned by model alone")
        if "deletionVectors" in (self._delta.protocol().writer_features or ()):
            raise StorageError(self.uri, "uses Delta's deletion vectors, which publishing doesn't know")

    def _transaction(self) -> int | None:
        """What the last publication has left in the log."""
        if self._delta is None:
            return None
        number: int | None = self._delta.transaction_version(self._app)
        return number

    def _state(self, version: int, token: str) -> str:
        return f"{self._states}/{version:08d}-{token}.parquet"

    def _files(self, ranges: dict[str, tuple[str | None, str | None]]) -> Iterator[DataFile]:
        """The model's files, as the log has them: somebody may have compacted the table since."""
        columns = (self._logged()[name].to_pylist() for name in ("path", "num_records", "size_bytes"))
        for path, rows, size in zip(*columns, strict=True):
            yield DataFile(unquote(path), rows or 0, size, *ranges.get(path, (None, None)))

    def _logged(self) -> pa.Table:
        """What the log says of each of the model's files."""
        actions = pa.table(self._delta.get_add_actions(flatten=True))
        return actions.filter(pc.equal(actions["partition.model"], self._model))

    def _removed(self, file: DataFile) -> Any:
        from deltalake.transaction import RemoveAction

        return RemoveAction(
            path=file.path,
            data_change=True,
            deletion_timestamp=_milliseconds(),
            size=file.bytes,
            partition_values={"model": self._model},
        )

    def _added(self, path: str, size: int, is_new: bool = True) -> Any:
        from deltalake.transaction import AddAction

        with self._storage.open(f"{self.uri}/{path}") as stream:
            # As it is: deltalake misreads long texts of surrogate pairs, which stand for emoji in ASCII.
            statistics = json.dumps(_statistics(pq.ParquetFile(stream)), ensure_ascii=False, allow_nan=False)
        return AddAction(path, size, {"model": self._model}, _milliseconds(), is_new, statistics)

    def _complete_statistics(self) -> None:
        """Adds the model's files of which the log lacks statistics once more, with all of them."""
        from deltalake import CommitProperties
        from deltalake.exceptions import DeltaError

        lacking = [row for row in self._logged().to_pylist() if not _has_statistics(row)]
        if not lacking:
            return
        added = [self._added(unquote(row["path"]), row["size_bytes"], is_new=False) for row in lacking]
        # Where somebody else commits meanwhile, the files may be gone: then the next publication does it.
        properties = CommitProperties(max_commit_retries=0)
        with suppress(DeltaError, OSError):
            self._delta.create_write_transaction(
                added, "append", self._table_schema(), ["model"], commit_properties=properties
            )

    def _table_schema(self) -> Any:
        """The table's columns, embeddings among them: other models may have some."""
        from deltalake import Schema

        return Schema.from_arrow(self._schema(embedding=True).append(pa.field("model", pa.string())))

    def _schema(self, embedding: bool) -> pa.Schema:
        """The columns of data files; embeddings are the same whatever precision and length they have."""
        columns = self.schema(prediction_schema("float32" if embedding else "none", 1))
        return columns.append(pa.field("published", pa.int64()))


def _folded(counts: Iterable[pa.Table]) -> pa.Table:
    """Several counts as one."""
    sums = [("rows", "sum"), ("least_published", "min"), ("published", "max")]
    return pa.concat_tables(counts).group_by("shard").aggregate(sums).rename_columns(_ROWS.names).cast(_ROWS)


def _compared(listed: pa.Table, counted: pa.Table) -> pa.Table:
    """The shards that a version has, as `SHARDS`; what is not as it was published is marked as `COUNTED`.

    Args:
        listed: what was published.
        counted: what is there, as `_ROWS`.
    """
    noted = listed.take(pc.index_in(counted["shard"], value_set=listed["shard"]))
    is_as_noted = pc.equal(counted["rows"], noted["rows"])
    for name in ("least_published", "published"):
        is_as_noted = pc.and_(is_as_noted, pc.equal(counted[name], noted["published"]))
    versions = pc.if_else(pc.fill_null(is_as_noted, False), noted["output_version"], COUNTED)
    sources = noted["source"]
    if len(owners := pc.unique(listed["source"]).to_pylist()) == 1:  # then what came back was its own, too
        sources = pc.fill_null(sources, pa.scalar(owners[0], pa.string()))
    columns = [counted["shard"], versions, counted["rows"], counted["published"], sources]
    is_without = pc.and_(
        pc.equal(listed["rows"], 0), pc.invert(pc.is_in(listed["shard"], value_set=counted["shard"]))
    )
    return pa.concat_tables([listed.filter(is_without), pa.table(columns, schema=SHARDS)]).sort_by("shard")


def _as_delta(column: pa.Field) -> pa.Field:
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        kind = pa.list_(pa.float32())
    return pa.field(column.name, kind)


def _number(snapshot: Snapshot) -> int | None:
    """A version and its attempt as the version of a Delta transaction; None before there is one."""
    return (snapshot.version << _TOKEN_BITS) | int(snapshot.token, 16) if snapshot.token else None


def _milliseconds() -> int:
    return time.time_ns() // 10**6


def _state_file(snapshot: Snapshot) -> bytes:
    notes = {
        "columns": snapshot.columns,
        "files": [(file.path, file.first_shard, file.last_shard) for file in snapshot.files],
    }
    table = snapshot.shards.replace_schema_metadata({_FOOTER: json.dumps(notes)})
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def _statistics(file: pq.ParquetFile) -> dict[str, Any]:
    """A file's statistics as Delta's log has them: bounds may be shortened, but must hold."""
    least: dict[str, Any] = {}
    greatest: dict[str, Any] = {}
    nulls: dict[str, int] = {}
    for name in _STATISTICS:
        nulls[name], low, high = _of_column(file, name)
        if low is not None:
            least[name], greatest[name] = _shortened_down(low), _shortened_up(high)
    return {
        "numRecords": file.metadata.num_rows,
        "minValues": least,
        "maxValues": greatest,
        "nullCount": nulls,
    }


def _of_column(file: pq.ParquetFile, name: str) -> tuple[int, Any, Any]:
    """How many nulls a column has, its least and its greatest value; None where it has no value."""
    metadata, place = file.metadata, file.schema.names.index(name)
    nulls, bounds = 0, []
    for number in range(metadata.num_row_groups):
        # pyarrow's objects are views: they must not outlive what they were taken from.
        group = metadata.row_group(number)
        column = group.column(place)
        found = column.statistics
        if found is None or not found.has_null_count or (found.num_values and not found.has_min_max):
            return _of_values(file.read(columns=[name])[name])  # Parquet leaves out bounds that are long
        nulls += found.null_count
        bounds += [found.min, found.max] if found.has_min_max else []
    return nulls, min(bounds, default=None), max(bounds, default=None)


def _of_values(values: pa.ChunkedArray) -> tuple[int, Any, Any]:
    bounds = pc.min_max(values).as_py()
    return values.null_count, bounds["min"], bounds["max"]


def _shortened_down(bound: Any) -> Any:
    """The bound, or what is a bit less than it."""
    return bound[:_LONGEST_BOUND] if isinstance(bound, str) else bound


def _shortened_up(bound: Any) -> Any:
    """The bound, or what is a bit greater: its last character that has a next one is that."""
    if not isinstance(bound, str) or len(bound) <= _LONGEST_BOUND:
        return bound
    for end in range(_LONGEST_BOUND - 1, -1, -1):
        code = ord(bound[end]) + 1
        if code <= sys.maxunicode:
            # Between 0xD7FF and 0xE000 there are no characters.
            return bound[:end] + chr(0xE000 if 0xD800 <= code < 0xE000 else code)
    return bound


def _has_statistics(logged: Mapping[str, Any]) -> bool:
    """Whether the log knows all statistics of a file."""
    for name in _STATISTICS:
        nulls = logged.get(f"null_count.{name}")
        if nulls is None:
            return False
        bounds = logged.get(f"min.{name}"), logged.get(f"max.{name}")
        if None in bounds and nulls != logged["num_records"]:
            return False
    return True


def _said(error: Exception) -> str:
    """What deltalake says, in one line: without colours, stacks, and the tags of what services answer."""
    text = re.split(r"\n\s*0: ", str(error))[0]
    text = re.sub(r"\x1b\[[0-9;]*m|<[^<>]*>", " ", text)
    return " ".join(text.split())[:_LONGEST_MESSAGE]
