"""One model's rows in a Delta table: its files, and the list of the shards that are in them.

A commit's transaction number has the version and the token of the snapshot that it makes. By these, a
publisher knows whether its attempt came through, and finds the list of shards, which was written before:

    <table>/_cvt_label/model=<name>-<fingerprint8>/<version>-<token>.parquet

Delta's own VACUUM removes data files that no version needs; nothing here does. Where the files are others
than were published, and more than OPTIMIZE and VACUUM happened, somebody edited the table: it is refused.
"""

import io
import json
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.publish.delta_log import SHARDS, DeltaLog, Snapshot
from pipeline.storage import ObjectNotFound, Storage, StorageError

_NOTES = b"cvt_label.table"


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

    def _published(self, logged: Snapshot) -> tuple[Snapshot, str | None]:
        """What is known of a version, and how somebody edited it; None where it is as it was published."""
        if not logged.token:
            return logged, "no publication of them is in its log" if logged.files else None
        uri = self._list(logged)
        try:
            table = pq.read_table(io.BytesIO(self.storage.read(uri)))
        except ObjectNotFound:
            return logged, f"the list of their shards is missing, {uri}"
        notes = json.loads(table.schema.metadata[_NOTES])
        found = replace(logged, columns=tuple(notes["columns"]), shards=table.cast(SHARDS))
        is_same = {file.path for file in found.files} == {*notes["files"]}
        return found, None if is_same else self._log.edit_since(found.transaction)

    def commit(self, base: Snapshot, snapshot: Snapshot) -> None:
        """Makes `snapshot` the current version in place of `base`; see `DeltaLog.commit`."""
        notes = {"columns": snapshot.columns, "files": [file.path for file in snapshot.files]}
        shards = snapshot.shards.replace_schema_metadata({_NOTES: json.dumps(notes)})
        out = io.BytesIO()
        pq.write_table(shards, out, compression="zstd")
        self.storage.write(self._list(snapshot), out.getvalue())
        self._log.commit(base, snapshot)

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
