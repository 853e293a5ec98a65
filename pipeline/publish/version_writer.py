"""Writes the data files of the next version of a consumer table; nothing refers to them yet."""

import re
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit import Partition
from pipeline.publish.data_files import DataFile, describe, encode, packed, read_rows
from pipeline.publish.delta_table import SHARDS, Snapshot
from pipeline.storage import StorageError

#: Files with less than this share of `file_bytes` are written again, together with what is added.
_SMALL = 1 / 12
_READERS = 16


@dataclass(frozen=True)
class VersionWriter:
    """Writes versions of the table at a URI; so many bytes of rows in memory make one file."""

    partition: Partition
    table: str
    schema: pa.Schema
    file_bytes: int

    def write(self, base: Snapshot, added: pa.Table, gone: pa.ChunkedArray, rebuild: bool) -> Snapshot:
        """Writes what changes `base` into the next version, and returns that, not yet committed.

        Args:
            base: the current version.
            added: shards to publish, sorted: `uri`, `rows`, `output`, `output_version`.
            gone: shards whose rows in `base` are left out.
            rebuild: write all files again: any of them may have rows that are not listed.
        """
        snapshot = base.successor()
        kept = base.shards.filter(pc.invert(pc.is_in(base.shards["shard"], value_set=gone)))
        candidates = base.files if len(kept) else ()  # without shards that are kept, no file is even read
        files = [file for file in candidates if not rebuild and self._stays(file, gone)]
        merged = [file for file in candidates if file not in files]
        written: list[DataFile] = []
        try:
            units = self._units(merged, kept["shard"], added, snapshot.version)
            for number, rows in enumerate(packed(units, self.file_bytes)):
                written.append(self._write_file(rows, f"{snapshot.name}-{number:04d}.parquet"))
        except BaseException:
            for file in written:
                with suppress(StorageError):  # it would hide what went wrong
                    self.partition.storage.delete(f"{self.table}/{file.path}")
            raise
        columns = [added[name] for name in ("uri", "output_version", "rows")]
        columns.append(pa.repeat(self.partition.uri, len(added)))
        shards = pa.concat_tables([kept, pa.table(columns, schema=SHARDS)]).sort_by("shard")
        return replace(snapshot, columns=(*self.schema.names,), files=(*files, *written), shards=shards)

    def _stays(self, file: DataFile, gone: pa.ChunkedArray) -> bool:
        """Whether a file is large and has no rows of these shards; mostly, its range of shards tells."""
        if file.bytes < self.file_bytes * _SMALL:
            return False
        is_within = pc.and_(pc.greater_equal(gone, file.first_shard), pc.less_equal(gone, file.last_shard))
        if not pc.any(is_within).as_py():
            return True
        shards = self._read(file, pa.schema([self.schema.field("shard")]))["shard"]
        return not pc.any(pc.is_in(shards, value_set=gone)).as_py()

    def _read(self, file: DataFile, schema: pa.Schema) -> pa.Table:
        return read_rows(self.partition.storage, f"{self.table}/{file.path}", None, schema)

    def _units(
        self, merged: Iterable[DataFile], kept: pa.ChunkedArray, added: pa.Table, version: int
    ) -> Iterator[pa.Table]:
        """Yields the rows to write: of kept shards file by file, then each added shard's, in order."""
        for file in merged:
            rows = self._read(file, self.schema)
            yield rows.filter(pc.is_in(rows["shard"], value_set=kept))

        storage, folder = self.partition.storage, self.partition.uri
        predictions = self.schema.remove(self.schema.get_field_index("published"))

        def read(output: str, output_version: str) -> pa.Table:
            rows = read_rows(storage, f"{folder}/{output}", output_version, predictions)
            return rows.append_column("published", pa.repeat(pa.scalar(version, pa.int64()), len(rows)))

        with ThreadPoolExecutor(_READERS, thread_name_prefix="publish") as pool:
            for batch in added.to_batches(max_chunksize=_READERS):
                yield from pool.map(read, batch["output"].to_pylist(), batch["output_version"].to_pylist())

    def _write_file(self, rows: pa.Table, name: str) -> DataFile:
        # The log has paths percent-encoded, and not every reader decodes them: so nothing is there to encode.
        folder = "model=" + re.sub(r"[^A-Za-z0-9._-]", "-", self.partition.model)
        path = f"{folder}/{name}"
        with tempfile.TemporaryFile() as file:
            encode(rows, file)
            size = file.tell()
            self.partition.storage.write(f"{self.table}/{path}", file)
        return describe(path, size, rows)
