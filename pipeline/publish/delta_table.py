"""One model's rows in a Delta table that is partitioned by model: data files, and the list of their shards.

`deltalake` only writes the log. A commit contains an application transaction of the model. Its number is also
in the name of the list of shards: `_cvt_label/model=<name>-<fingerprint8>/<version>-<token>.parquet`.
"""

import importlib.util
import io
import json
import re
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import Any, Self
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.publish.data_files import SCHEMA, DataFile
from pipeline.storage import ABSENT, ObjectNotFound, Storage, StorageError, encode_parquet, read_table

#: Operations that are allowed between publications, because they do not change rows.
_MAINTENANCE_OPERATIONS = {"OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES"}

#: The list of shards: one row per shard in the table, sorted by shard. `output_version` is the published
#: version of the shard's prediction file, `rows` the number of rows, `source` the URI of the partition. A
#: null `output_version` means that the table was edited later, and the shard must be published again.
SHARDS_SCHEMA = pa.schema(
    {"shard": pa.string(), "output_version": pa.string(), "rows": pa.int64(), "source": pa.string()}
)
#: Metadata key of the list of shards. The value is JSON with the paths of all data files, and with the
#: version of the Delta table that the publication changed.
_METADATA_KEY = b"cvt_label.table"

_TOKENS_PER_VERSION = 2**32


class TableChangedError(Exception):
    """Another publisher committed first: the table is no longer the version that was read."""


@dataclass(frozen=True)
class Snapshot:
    """One model's rows in one version of a table.

    Attributes:
        transaction: transaction number in the log: 2**32 times the version, plus a random token. The token
            distinguishes attempts at the same version. It is 0 if the log has no publication.
        shards: the shards whose rows are in the files, with the schema `SHARDS_SCHEMA`.
        delta_version: the version of the Delta table; None if there is no table.
    """

    transaction: int = 0
    files: tuple[DataFile, ...] = ()
    shards: pa.Table = field(default_factory=SHARDS_SCHEMA.empty_table)
    delta_version: int | None = None

    @property
    def version(self) -> int:
        """The model's publication number, from 1; 0 before the first publication."""
        return self.transaction // _TOKENS_PER_VERSION

    @property
    def name(self) -> str:
        """Version and token, for file names."""
        return f"{self.version:08d}-{self.transaction % _TOKENS_PER_VERSION:08x}"

    def next_version(self) -> Self:
        """Returns the next version without files, with a new token."""
        token = secrets.randbelow(_TOKENS_PER_VERSION)
        return type(self)(_TOKENS_PER_VERSION * (self.version + 1) + token)

    @property
    def rows(self) -> int:
        """Number of rows of all shards."""
        total: int = pc.sum(self.shards["rows"]).as_py() or 0
        return total


@dataclass(frozen=True)
class DeltaTable:
    """The rows of one model, `<name>-<fingerprint8>`, in a Delta table."""

    storage: Storage
    uri: str
    model: str

    def read(self, rebuild: bool = False) -> Snapshot:
        """Reads the current version; returns a version without files before the first publication.

        With `rebuild`, the table may be edited. Then every shard must be published again, and the files may
        contain rows of shards that are not in the list.

        Raises:
            StorageError: the table cannot be read, publishing could damage the table, `deltalake` is not
                installed, or the table was edited.
            TableChangedError: another publisher committed first.
        """
        logged = self._read_log()
        if not logged.transaction:
            return logged
        snapshot, edit, uri = logged, None, self._shards_uri(logged)
        try:
            table = read_table(io.BytesIO(self.storage.read(uri)))
        except ObjectNotFound:
            edit = f"the list of shards is missing: {uri}"
        else:
            snapshot = replace(logged, shards=table.select(SHARDS_SCHEMA.names).cast(SHARDS_SCHEMA))
            published = json.loads(table.schema.metadata[_METADATA_KEY])
            if {file.path for file in logged.files} != {*published["files"]}:
                edit = self._find_edit(published["base"])
        if edit is None:
            return snapshot
        # Another publisher may have removed the list of shards.
        if self._read_log().transaction != logged.transaction:
            raise TableChangedError(f"{self.uri}: another publisher committed first")
        if not rebuild:
            cause = f"the rows of model={self.model} differ from the published rows: {edit}"
            raise StorageError(self.uri, f"{cause}; publish every dataset of the model again, with --rebuild")
        unknown = pa.nulls(len(snapshot.shards), pa.string())
        shards = snapshot.shards.set_column(1, SHARDS_SCHEMA.field(1), unknown)
        return replace(snapshot, shards=shards)

    def _read_log(self) -> Snapshot:
        """Reads the current version from Delta's log, without the list of shards."""
        if importlib.util.find_spec("deltalake") is None:
            cause = "Delta tables require the package deltalake: pip install 'cvt-label[delta]'"
            raise StorageError(self.uri, cause)
        # Listing first reports access failures with the messages of `storage`.
        log_files = self.storage.list(f"{self.uri}/_delta_log")
        table = self._open() if next(log_files, None) is not None else None
        if table is None:
            return Snapshot()
        if table.metadata().partition_columns != ["model"]:
            raise StorageError(
                self.uri, "the Delta table is not partitioned by exactly the column model; use another table"
            )
        if "deletionVectors" in (table.protocol().writer_features or ()):
            raise StorageError(self.uri, "the table uses deletion vectors, which publishing does not support")
        added = pa.table(table.get_add_actions(flatten=True))
        rows = added.filter(pc.equal(added["partition.model"], self.model)).to_pylist()
        files = []
        for row in rows:
            # Without bounds in the log, the range is from the lowest to the highest Unicode character.
            bounds = row.get("min.shard") or "", row.get("max.shard") or "\U0010ffff"
            files.append(DataFile(unquote(row["path"]), row["size_bytes"], *bounds))
        transaction = table.transaction_version(self._app_id) or 0
        if files and not transaction:
            cause = f"has rows of model={self.model}, but no publication in its log; use another table"
            raise StorageError(self.uri, cause)
        return Snapshot(transaction, (*files,), delta_version=table.version())

    def _find_edit(self, base: int) -> str | None:
        """Describes an edit after version `base`; returns None if there is none."""
        for entry in self._open().history():
            if entry["version"] <= base:
                return None
            if "cvt_label" not in entry and entry.get("operation") not in _MAINTENANCE_OPERATIONS:
                return f"{entry.get('operation')} in version {entry['version']} of the table"
        return "the log no longer reaches back to the publication"

    def commit(self, base: Snapshot, snapshot: Snapshot) -> None:
        """Replaces the current version `base` by `snapshot` in one transaction.

        Raises:
            StorageError: the transaction failed.
            TableChangedError: another publisher committed first.
        """
        from deltalake import CommitProperties, Schema, Transaction
        from deltalake import DeltaTable as Table
        from deltalake.exceptions import DeltaError

        transaction, version = snapshot.transaction, base.delta_version
        metadata = json.dumps({"files": [file.path for file in snapshot.files], "base": version or 0})
        shards = snapshot.shards.replace_schema_metadata({_METADATA_KEY: metadata})
        content = encode_parquet(shards)
        # Conditional, so that a store that ignores conditions is refused: Delta's log needs them.
        self.storage.update(self._shards_uri(snapshot), lambda _: content, ABSENT)

        options = self.storage.object_store_options(self.uri)
        properties = CommitProperties(
            app_transactions=[Transaction(self._app_id, transaction)],
            custom_metadata={"cvt_label": {"transaction": transaction}},
        )
        schema = Schema.from_arrow(SCHEMA.append(pa.field("model", pa.string())))
        try:
            if version is None:
                Table.create(self.uri, schema, "ignore", ["model"], storage_options=options)
            self._open(version or 0).create_write_transaction(
                self._actions(base, snapshot), "append", schema, ["model"], commit_properties=properties
            )
        except (DeltaError, OSError) as error:
            current = self._read_log()
            if current.transaction == transaction:
                return  # the commit succeeded, and only the response was lost
            if current.delta_version == version:
                cause = f"the transaction was not committed: {_delta_error_text(error)}"
                raise StorageError(self.uri, cause) from error
            raise TableChangedError(f"{self.uri}: another publisher committed first") from error

    def clean_up(self, snapshot: Snapshot) -> None:
        """Removes lists of shards of earlier versions, and of failed attempts at this version."""
        self.storage.remove_unfinished_writes(self.uri)
        current = self._shards_uri(snapshot)
        version_prefix = current.removesuffix(".parquet").rpartition("-")[0]
        for uri in [info.uri for info in self.storage.list(current.rpartition("/")[0])]:
            if uri[: len(version_prefix)] <= version_prefix and uri != current:
                self.storage.delete(uri)

    @property
    def _app_id(self) -> str:
        return f"cvt-label/model={self.model}"

    def _shards_uri(self, snapshot: Snapshot) -> str:
        return f"{self.uri}/_cvt_label/model={self.model}/{snapshot.name}.parquet"

    def _actions(self, before: Snapshot, after: Snapshot) -> list[Any]:
        from deltalake.transaction import AddAction, RemoveAction

        now, partition = time.time_ns() // 10**6, {"model": self.model}
        files_before, files_after = {*before.files}, {*after.files}
        added = [
            AddAction(file.path, file.bytes, partition, now, True, file.statistics)
            for file in after.files
            if file not in files_before
        ]
        removed = [
            RemoveAction(file.path, True, deletion_timestamp=now, size=file.bytes, partition_values=partition)
            for file in before.files
            if file not in files_after
        ]
        return [*added, *removed]

    def _open(self, version: int | None = None) -> Any:
        """Opens a version of the table, by default the current one; None if there is no table.

        Each call uses the current credentials.
        """
        import deltalake
        from deltalake.exceptions import DeltaError, TableNotFoundError

        options = self.storage.object_store_options(self.uri)
        try:
            return deltalake.DeltaTable(self.uri, version=version, storage_options=options)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            cause = f"cannot be read as a Delta table: {_delta_error_text(error)}"
            raise StorageError(self.uri, cause) from None


def _delta_error_text(error: Exception) -> str:
    """Returns deltalake's message in one line, without colors, stack traces and XML tags."""
    text = re.split(r"\n\s*0: ", str(error))[0]
    text = re.sub(r"\x1b\[[0-9;]*m|<[^<>]*>", " ", text)
    return " ".join(text.split())[:300]
