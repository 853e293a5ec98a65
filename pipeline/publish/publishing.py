"""Brings a consumer table in line with the manifest of a partition: what is new, has changed or was removed.

A prediction file is the unit of commit, so there are as many as shards; who queries all of them is better
served by few large ones. The order of a publication:

1. Read the current version of the table, and compare it with the manifest.
2. Write data files under names that no other attempt has: readers don't know of them.
3. Make the next version the current one in one transaction. If another publisher was faster, start again
   from what that one has published.
4. Remove lists of shards that earlier attempts and versions left behind.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit import Partition, prediction_files
from pipeline.config import ConfigError
from pipeline.publish.data_files import SCHEMA, DataFile, packed, read_rows, write_file
from pipeline.publish.delta_table import SHARDS, DeltaTable, Snapshot, TableChangedError
from pipeline.storage import ObjectChanged, ObjectNotFound, StorageError, is_under, normalize_uri

#: Bytes of rows in memory that make one file. As Parquet that is a third of it; with embeddings, most of it.
FILE_BYTES = 512 * 1024**2
#: Files with less than this share of `file_bytes` are written again, together with what is added.
_SMALL = 1 / 12
_ATTEMPTS = 5
_READERS = 16


class TableBusyError(RuntimeError):
    """Table or labels changed again and again while they were read; the message says which."""


@dataclass(frozen=True)
class Publication:
    """The result of publishing.

    Attributes:
        snapshot: the version of the table that is current now.
        added: shards that the table lacked, sorted: `uri`, `rows`, and their prediction files, `output`
            (relative to the partition) and `output_version`.
        replaced: those of them that the table had from this partition already.
        removed: shards that the table had from this partition, and that are no longer labeled.
        pending: shards whose file has changed since the manifest was written: they wait.
        is_new: whether this publication made the version; else there was nothing to do.
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
    """Brings a Delta table in line with the manifest of a partition.

    The table may also hold rows of other models, and of other partitions (datasets) of this model.

    Args:
        partition: whose predictions are published.
        uri: the table's.
        rebuild: publish all shards again, also where somebody edited the table: that is refused otherwise.
        embedding: whether embeddings of these shards are published too, where there are any.
        file_bytes: bytes of rows in memory that make one file; memory is about three times that.

    Raises:
        ConfigError: the table would be in the output or the input, or contain it.
        TableBusyError: other publishers, or a run, were faster each time.
        StorageError: nothing is labeled yet; something can't be read or written; somebody edited the table;
            or it has a shard from another partition.
    """
    table = DeltaTable(partition.storage, normalize_uri(uri), partition.model)
    _check_place(table.uri, partition)
    if not partition.manifest.exists():
        raise StorageError(partition.uri, "nothing is labeled yet")
    publisher = _Publisher(partition, table, rebuild, embedding, file_bytes)
    cause: Exception | None = None
    for _ in range(_ATTEMPTS):
        try:
            return publisher.publish()
        except TableChangedError as error:
            cause = error
        except (ObjectChanged, ObjectNotFound) as error:
            if not is_under(error.uri, partition.uri):
                raise
            cause = error  # a run has replaced labels
    raise TableBusyError(f"{table.uri}: not published, since others were faster {_ATTEMPTS} times: {cause}")


def _check_place(table: str, partition: Partition) -> None:
    """Refuses places where readers, or Delta's VACUUM, would mix the table up with other things."""
    source = partition.config().get("input", {}).get("uri")
    for name, place in {"output": partition.uri.rpartition("/")[0], "input": source}.items():
        if place and (is_under(table, place) or is_under(place, table)):
            raise ConfigError(f"{table}: a table needs a place of its own, and the {name} is {place}")


@dataclass(frozen=True)
class _Publisher:
    """Publishes to the table what it lacks of the partition's labels."""

    partition: Partition
    table: DeltaTable
    rebuild: bool
    embedding: bool
    file_bytes: int

    def publish(self) -> Publication:
        """Publishes to the current version of the table; raises `TableChangedError` if others are faster."""
        base, source = self.table.read(self.rebuild), self.partition.uri
        # After it: what others have published meanwhile is labeled, too.
        labeled = self.partition.manifest.labeled(("uri", "rows", "output", "output_version"))
        shards, sources = base.shards, base.shards["source"]
        twice = _those(shards.filter(pc.not_equal(sources, source))["shard"], labeled["uri"])
        if len(twice):
            other = sources.filter(pc.equal(shards["shard"], twice[0]))[0]
            cause = f"has the shard {twice[0]} from {other} already: {source} needs a table of its own"
            raise StorageError(self.table.uri, cause)
        published = shards["output_version"].take(pc.index_in(labeled["uri"], value_set=shards["shard"]))
        is_same = pc.fill_null(pc.equal(labeled["output_version"], published), False)
        due = labeled if self.rebuild else labeled.filter(pc.invert(is_same))
        added, pending = self._by_presence(due)
        own = shards.filter(pc.equal(sources, source))["shard"]
        replaced = _those(added["uri"], own)
        removed = _those(own, (added if self.rebuild else labeled)["uri"], False)
        is_new = bool(len(added) or len(removed) or (self.rebuild and base.files))
        snapshot = base
        if is_new:
            gone = pa.chunked_array([*replaced.chunks, *removed.chunks], pa.string())
            snapshot = self._write(base, added, gone)
            self.table.commit(base, snapshot)
        self.table.clean_up(snapshot)
        return Publication(self.table.uri, snapshot, added, replaced, removed, pending, is_new)

    def _by_presence(self, shards: pa.Table) -> tuple[pa.Table, pa.ChunkedArray]:
        """Shards whose prediction file is there in the manifest's version, and the URIs of all others."""
        missing = set(zip(shards["output"].to_pylist(), shards["output_version"].to_pylist(), strict=True))
        if missing:
            start = len(self.partition.uri) + 1
            files = prediction_files(self.partition.storage, self.partition.uri)
            missing.difference_update((info.uri[start:], info.version) for info in files)
        absent = pa.array([output for output, _ in missing], pa.string())
        is_absent = pc.is_in(shards["output"], value_set=absent)
        return shards.filter(pc.invert(is_absent)), shards["uri"].filter(is_absent)

    def _write(self, base: Snapshot, added: pa.Table, gone: pa.ChunkedArray) -> Snapshot:
        """Writes the files of the next version: without rows of `gone` shards, with those of `added` ones.

        To rebuild, it writes all files again: any of them may have rows that are not listed.
        """
        snapshot, storage = base.successor(), self.partition.storage
        kept = base.shards.filter(pc.invert(pc.is_in(base.shards["shard"], value_set=gone)))
        candidates = base.files if len(kept) else ()  # without shards that are kept, no file is even read
        files = [file for file in candidates if not self.rebuild and self._stays(file, gone)]
        merged = [file for file in candidates if file not in files]
        written: list[DataFile] = []
        # The log has paths percent-encoded, and not every reader decodes them: so nothing is there to encode.
        folder = "model=" + re.sub(r"[^A-Za-z0-9._-]", "-", self.partition.model)
        try:
            units = self._units(merged, kept["shard"], added, snapshot.version)
            for number, rows in enumerate(packed(units, self.file_bytes)):
                path = f"{folder}/{snapshot.name}-{number:04d}.parquet"
                written.append(write_file(storage, self.table.uri, path, rows))
        except BaseException:
            for file in written:
                with suppress(StorageError):  # it would hide what went wrong
                    storage.delete(f"{self.table.uri}/{file.path}")
            raise
        columns = [added[name] for name in ("uri", "output_version", "rows")]
        columns.append(pa.repeat(self.partition.uri, len(added)))
        shards = pa.concat_tables([kept, pa.table(columns, schema=SHARDS)]).sort_by("shard")
        return replace(snapshot, files=(*files, *written), shards=shards)

    def _stays(self, file: DataFile, gone: pa.ChunkedArray) -> bool:
        """Whether a file is large and has no rows of these shards; mostly, its range of shards tells."""
        if file.bytes < self.file_bytes * _SMALL:
            return False
        is_within = pc.and_(pc.greater_equal(gone, file.first_shard), pc.less_equal(gone, file.last_shard))
        if not pc.any(is_within).as_py():
            return True
        shards = self._read(file, ["shard"])["shard"]
        return not pc.any(pc.is_in(shards, value_set=gone)).as_py()

    def _read(self, file: DataFile, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
        return read_rows(self.partition.storage, f"{self.table.uri}/{file.path}", columns=columns)

    def _units(
        self, merged: Iterable[DataFile], kept: pa.ChunkedArray, added: pa.Table, version: int
    ) -> Iterator[pa.Table]:
        """Yields the rows to write: of kept shards file by file, then each added shard's, in order."""
        for file in merged:
            rows = self._read(file)
            yield rows.filter(pc.is_in(rows["shard"], value_set=kept))
        constants = {"published": version} | ({} if self.embedding else {"embedding": None})

        def read(output: str, output_version: str) -> pa.Table:
            uri = f"{self.partition.uri}/{output}"
            return read_rows(self.partition.storage, uri, output_version, constants=constants)

        with ThreadPoolExecutor(_READERS, thread_name_prefix="publish") as pool:
            for batch in added.to_batches(max_chunksize=_READERS):
                yield from pool.map(read, batch["output"].to_pylist(), batch["output_version"].to_pylist())


def _those(values: pa.ChunkedArray, among: pa.ChunkedArray, are_in: bool = True) -> pa.ChunkedArray:
    """The values that are, or are not, among others."""
    is_in = pc.is_in(values, value_set=among)
    return values.filter(is_in if are_in else pc.invert(is_in))
