"""Updates a consumer table to the manifest of a partition: adds, replaces and removes shards.

Readers do not see the new data files before the next version is committed, in one transaction.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit import Partition
from pipeline.config import ConfigError, InputUris
from pipeline.publish.data_files import DataFile, pack_rows, read_rows, write_data_file
from pipeline.publish.delta_table import SHARDS_SCHEMA, DeltaTable, Snapshot, TableChangedError
from pipeline.storage import (
    ObjectChanged,
    ObjectNotFound,
    StorageError,
    is_under,
    map_in_threads,
    normalize_uri,
    pause_after,
)

#: Size of the rows of one file in memory, in bytes. The Parquet file has about a third of this size. With
#: embeddings, its size is nearly the same.
FILE_BYTES = 512 * 1024**2
#: Files smaller than this fraction of `file_bytes` are merged with added rows.
_SMALL_FILE_FRACTION = 1 / 12
_MAX_ATTEMPTS = 5


class TableBusyError(RuntimeError):
    """The table or the labels changed during every attempt. The message names the changed object."""


@dataclass(frozen=True)
class Publication:
    """The result of publishing.

    Attributes:
        added: rows of the manifest, of new and changed shards.
        replaced: URIs of added shards that the table already had from this partition.
        removed: URIs of shards that the table had from this partition and that are no longer labeled.
        pending: URIs of shards that changed after the manifest was written, and are not published yet.
        is_new: whether this publication committed the version. False if the table was up to date.
    """

    table: str
    snapshot: Snapshot
    added: pa.Table
    replaced: pa.ChunkedArray
    removed: pa.ChunkedArray
    pending: pa.ChunkedArray
    is_new: bool


def publish_labels(
    partition: Partition,
    uri: str,
    *,
    rebuild: bool = False,
    embedding: bool = True,
    file_bytes: int = FILE_BYTES,
) -> Publication:
    """Updates a Delta table to the manifest of a partition.

    The table may also contain rows of other models, and of other partitions (datasets) of this model.

    Args:
        partition: the partition to publish.
        uri: URI of the table.
        rebuild: publish all shards again, also of an edited table. By default, an edited table is refused.
        embedding: whether to publish embeddings, if the predictions have any.
        file_bytes: size of the rows of one file in memory, in bytes. Peak memory is about three times this.

    Raises:
        ConfigError: the table is in the output or in the input, or contains one of them.
        TableBusyError: other publishers or a run changed the table or the labels during every attempt.
        StorageError: the partition has no labels; an object cannot be read or written; the table was edited,
            or contains a shard from another partition.
    """
    table = DeltaTable(partition.storage, normalize_uri(uri), partition.model)
    _check_location(table.uri, partition)
    if not partition.manifest.exists():
        raise StorageError(partition.uri, "nothing is labeled yet; run cvt-label label first")
    publisher = _Publisher(partition, table, rebuild, embedding, file_bytes)
    cause: Exception | None = None
    for attempt in range(_MAX_ATTEMPTS):
        if attempt:
            time.sleep(pause_after(attempt))
        try:
            return publisher.publish()
        except TableChangedError as error:
            cause = error
        except (ObjectChanged, ObjectNotFound) as error:
            if not is_under(error.uri, partition.uri):
                raise
            cause = error  # a run replaced labels
    changed = f"the table or the labels changed during all {_MAX_ATTEMPTS} attempts ({cause})"
    raise TableBusyError(f"{table.uri}: not published: {changed}; publish again later")


def _check_location(table: str, partition: Partition) -> None:
    """Refuses locations where readers or Delta's VACUUM would confuse the table with other files."""
    inputs, output = InputUris.of_record({"config": partition.config()}), partition.uri.rpartition("/")[0]
    locations = [("output", InputUris.parse(output))] + ([("input", inputs)] if inputs is not None else [])
    for name, uris in locations:
        if uris.covers(table) or any(is_under(root, table) for root in uris.roots):
            raise ConfigError(f"{table}: the table must be outside the {name} {uris}, and not contain it")


@dataclass(frozen=True)
class _Publisher:
    """Publishes new and changed labels of the partition to the table."""

    partition: Partition
    table: DeltaTable
    rebuild: bool
    embedding: bool
    file_bytes: int

    def publish(self) -> Publication:
        """Makes one attempt; raises `TableChangedError` if another publisher commits first."""
        base, source = self.table.read(self.rebuild), self.partition.uri
        # The manifest is read after the table: all shards that others have published are labeled in it.
        labeled = self.partition.manifest.labeled(("uri", "rows", "output", "output_version"))
        shards, is_own = base.shards, pc.equal(base.shards["source"], source)
        others, own = shards.filter(pc.invert(is_own)), shards.filter(is_own)["shard"]
        if duplicates := others.filter(pc.is_in(others["shard"], value_set=labeled["uri"])).to_pylist():
            cause = f"the table already has shard {duplicates[0]['shard']} from {duplicates[0]['source']}"
            raise StorageError(self.table.uri, f"{cause}; publish {source} to another table")
        published = shards["output_version"].take(pc.index_in(labeled["uri"], value_set=shards["shard"]))
        is_current = pc.fill_null(pc.equal(labeled["output_version"], published), False)
        outdated = labeled if self.rebuild else labeled.filter(pc.invert(is_current))
        added, pending = self._split_by_presence(outdated)
        replaced = own.filter(pc.is_in(own, value_set=added["uri"]))
        remaining = (added if self.rebuild else labeled)["uri"]
        removed = own.filter(pc.invert(pc.is_in(own, value_set=remaining)))
        is_new = bool(len(added) or len(removed) or (self.rebuild and base.files))
        snapshot = base
        if is_new:
            dropped = pa.chunked_array([*replaced.chunks, *removed.chunks], pa.string())
            snapshot = self._write(base, added, dropped)
            self.table.commit(base, snapshot)
        self.table.clean_up(snapshot)
        return Publication(self.table.uri, snapshot, added, replaced, removed, pending, is_new)

    def _split_by_presence(self, shards: pa.Table) -> tuple[pa.Table, pa.ChunkedArray]:
        """Returns the shards whose prediction file has the manifest's version, and the URIs of the others."""
        missing = set(zip(shards["output"].to_pylist(), shards["output_version"].to_pylist(), strict=True))
        if missing:
            start = len(self.partition.uri) + 1
            files = self.partition.prediction_files()
            missing.difference_update((info.uri[start:], info.version) for info in files)
        absent = pa.array([output for output, _ in missing], pa.string())
        is_absent = pc.is_in(shards["output"], value_set=absent)
        return shards.filter(pc.invert(is_absent)), shards["uri"].filter(is_absent)

    def _write(self, base: Snapshot, added: pa.Table, dropped: pa.ChunkedArray) -> Snapshot:
        """Writes the files of the next version: removes `dropped` shards, adds `added` shards.

        A rebuild rewrites all files, because each may contain rows of shards that are not in the list.
        """
        snapshot, storage = base.next_version(), self.partition.storage
        kept = base.shards.filter(pc.invert(pc.is_in(base.shards["shard"], value_set=dropped)))
        candidates = base.files if len(kept) else ()  # if no shard is kept, no file is read
        files = [file for file in candidates if not self.rebuild and self._can_keep(file, dropped)]
        merged = [file for file in candidates if file not in files]
        # Delta's log contains percent-encoded paths, and some readers do not decode them. These names need no
        # encoding.
        folder = "model=" + re.sub(r"[^A-Za-z0-9._-]", "-", self.partition.model)
        tables = self._rows(merged, kept["shard"], added, snapshot.version)
        for number, rows in enumerate(pack_rows(tables, self.file_bytes)):
            path = f"{folder}/{snapshot.name}-{number:04d}.parquet"
            try:
                files.append(write_data_file(storage, self.table.uri, path, rows))
            except StorageError as error:
                raise StorageError(self.table.uri, f"cannot be written: {error.cause}") from error
        columns = [added[name] for name in ("uri", "output_version", "rows")]
        columns.append(pa.repeat(self.partition.uri, len(added)))
        shards = pa.concat_tables([kept, pa.table(columns, schema=SHARDS_SCHEMA)]).sort_by("shard")
        return replace(snapshot, files=(*files,), shards=shards)

    def _can_keep(self, file: DataFile, dropped: pa.ChunkedArray) -> bool:
        """Returns whether a file is large and has no rows of dropped shards.

        Reads the file if the range of its shards contains a dropped shard.
        """
        if file.bytes < self.file_bytes * _SMALL_FILE_FRACTION:
            return False
        is_within = pc.and_(
            pc.greater_equal(dropped, file.first_shard), pc.less_equal(dropped, file.last_shard)
        )
        if not pc.any(is_within).as_py():
            return True
        rows = read_rows(self.partition.storage, f"{self.table.uri}/{file.path}", columns=["shard"])
        return not pc.any(pc.is_in(rows["shard"], value_set=dropped)).as_py()

    def _rows(
        self, merged: Iterable[DataFile], kept: pa.ChunkedArray, added: pa.Table, version: int
    ) -> Iterator[pa.Table]:
        """Yields the rows to write: the kept rows of each merged file, then the rows of each added shard."""
        storage = self.partition.storage
        for file in merged:
            rows = read_rows(storage, f"{self.table.uri}/{file.path}")
            yield rows.filter(pc.is_in(rows["shard"], value_set=kept))
        constants = {"published": version} | ({} if self.embedding else {"embedding": None})

        def read(shard: Mapping[str, Any]) -> pa.Table:
            uri = f"{self.partition.uri}/{shard['output']}"
            return read_rows(storage, uri, shard["output_version"], constants=constants)

        shards = (shard for batch in added.to_batches(1000) for shard in batch.to_pylist())
        yield from map_in_threads(read, shards, threads=8)
