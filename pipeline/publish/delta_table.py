"""One model's rows in a Delta table: its files, and the list of the shards that are in them.

A commit's transaction number has the version and the token of the snapshot that it makes. By these, a
publisher knows whether its attempt came through, and finds the list of shards, which was written before:

    <table>/_cvt_label/model=<name>-<fingerprint8>/<version>-<token>.parquet

Delta's own VACUUM removes data files that no version needs; nothing here does. Where the files are others
than were published, and more than OPTIMIZE and VACUUM happened, somebody edited the table: it is refused.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.publish.data_files import DataFile
from pipeline.publish.delta_log import DeltaLog, LoggedFiles
from pipeline.storage import ObjectNotFound, Storage, StorageError

#: One row per shard in a table, sorted: the version of its prediction file that was published, its rows, the
#: version of the table that brought them, and the URI of the partition that they are from. A null
#: `output_version` means that somebody edited the table since: the shard is to be published again.
SHARDS = pa.schema(
    [
        ("shard", pa.string()),
        ("output_version", pa.string()),
        ("rows", pa.int64()),
        ("published", pa.int64()),
        ("source", pa.string()),
    ]
)

_NOTES = b"cvt_label.table"

_TOKEN_BITS = 32


@dataclass(frozen=True)
class Snapshot:
    """One model's rows in one version of a table.

    Attributes:
        version: counts up from 1; 0 before anything is published.
        token: distinguishes attempts at the same version.
        columns: names of the columns.
        shards: the shards whose rows are in them, as `SHARDS`.
        logged: what the log has of the version; empty where it is not committed.
    """

    version: int = 0
    token: str = ""
    columns: tuple[str, ...] = ()
    files: tuple[DataFile, ...] = ()
    shards: pa.Table = field(default_factory=SHARDS.empty_table)
    logged: LoggedFiles = field(default_factory=LoggedFiles)

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        total: int = pc.sum(self.shards["rows"]).as_py() or 0
        return total


@dataclass(frozen=True)
class DeltaTable:
    """The rows of one model, named `<name>-<fingerprint8>`, in a Delta table."""

    storage: Storage
    uri: str
    model: str

    def read(self, rebuild: bool = False) -> Snapshot:
        """Reads the current version; one without files before anything is published.

        With `rebuild`, it may be edited. Then every shard in it is to be published again, and its files may
        have rows that no shard in the list has.

        Raises:
            StorageError: as `DeltaLog.read`; or somebody edited the table.
        """
        while True:
            logged = self._log.read()
            found, edit = self._published(logged)
            if edit is None:
                return found
            if self._log.read().transaction == logged.transaction:
                break  # else another publisher has removed the list of shards meanwhile
        if not rebuild:
            cause = f"rows of model={self.model} are not as they were published: {edit}"
            raise StorageError(self.uri, f"{cause}; publish every dataset of the model again, with --rebuild")
        unknown = pa.nulls(len(found.shards), pa.string())
        return replace(found, shards=found.shards.set_column(1, SHARDS.field(1), unknown))

    def _published(self, logged: LoggedFiles) -> tuple[Snapshot, str | None]:
        """What is known of a version, and how somebody edited it; None where it is as it was published."""
        files, number = logged.files, logged.transaction
        if number is None:
            found = Snapshot(logged.last_published, files=files, logged=logged)
            return found, "no publication of them is in its log" if files else None
        version, token = number >> _TOKEN_BITS, f"{number % 2**_TOKEN_BITS:08x}"
        found = Snapshot(version, token, files=files, logged=logged)
        uri = self._list(found)
        try:
            table = pq.read_table(io.BytesIO(self.storage.read(uri)))
        except ObjectNotFound:
            return found, f"the list of their shards is missing, {uri}"
        notes = json.loads(table.schema.metadata[_NOTES])
        found = replace(found, columns=tuple(notes["columns"]), shards=table.cast(SHARDS))
        is_same = {file.path for file in files} == {*notes["files"]}
        return found, None if is_same else self._log.edit_since(number)

    def commit(self, base: Snapshot, snapshot: Snapshot) -> None:
        """Makes `snapshot` the current version in place of `base`, the one that was read last.

        Raises:
            TableChangedError: the current version is another one.
            StorageError: the version can't be written.
        """
        notes = {"columns": snapshot.columns, "files": [file.path for file in snapshot.files]}
        shards = snapshot.shards.replace_schema_metadata({_NOTES: json.dumps(notes)})
        out = io.BytesIO()
        pq.write_table(shards, out, compression="zstd")
        self.storage.write(self._list(snapshot), out.getvalue())
        number = (snapshot.version << _TOKEN_BITS) | int(snapshot.token, 16)
        self._log.commit(base.logged, snapshot.files, number)

    def clean_up(self, snapshot: Snapshot) -> None:
        """Removes the lists of shards of earlier versions, and of attempts at this one that have lost."""
        self.storage.sweep(self.uri)
        for uri in [info.uri for info in self.storage.list(self._lists, missing_ok=True)]:
            digits = uri.rpartition("/")[2].partition("-")[0]
            is_over = digits.isdecimal() and int(digits) <= snapshot.version
            if is_over and uri != self._list(snapshot):
                self.storage.delete(uri)

    @property
    def _log(self) -> DeltaLog:
        return DeltaLog(self.storage, self.uri, self.model)

    @property
    def _lists(self) -> str:
        return f"{self.uri}/_cvt_label/model={self.model}"

    def _list(self, snapshot: Snapshot) -> str:
        return f"{self._lists}/{snapshot.version:08d}-{snapshot.token}.parquet"
