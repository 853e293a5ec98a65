"""One model's rows in a Delta table that is partitioned by model: data files, and the list of their shards.

`deltalake` only writes the log: one commit adds and removes files. Each commit contains an application
transaction of the model. If two publishers commit at the same time, deltalake refuses the slower one. A
publisher finds the transaction number in the log if its attempt was committed. The number is also part of the
name of the list of shards, which is written before the commit:

    <table>/_cvt_label/model=<name>-<fingerprint8>/<version>-<token>.parquet

If the table's files differ from the published files, and more than maintenance (OPTIMIZE, VACUUM) ran, the
table was edited. Publishing to an edited table is refused. Only VACUUM removes data files.
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
import pyarrow.parquet as pq

from pipeline.publish.data_files import SCHEMA, DataFile
from pipeline.storage import ABSENT, ObjectNotFound, Storage, StorageError, pause_after, read_table

#: Operations that are allowed between publications, because they do not change rows.
_MAINTENANCE_OPERATIONS = {"OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES"}

#: The list of shards: one row per shard in the table, sorted by shard. `output_version` is the published
#: version of the shard's prediction file, `rows` the number of rows, `source` the URI of the partition. A
#: null `output_version` means that the table was edited later, and the shard must be published again.
SHARDS_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("output_version", pa.string()),
        ("rows", pa.int64()),
        ("source", pa.string()),
    ]
)
#: Metadata key of the list of shards. The value is JSON with the paths of all data files.
_METADATA_KEY = b"cvt_label.table"

_TOKENS_PER_VERSION = 2**32
_COMMIT_ATTEMPTS = 20

#: The highest Unicode character, an upper bound if the log has none.
_MAX_CHARACTER = "\U0010ffff"


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
        return type(self)(
            _TOKENS_PER_VERSION * (self.version + 1) + secrets.randbelow(_TOKENS_PER_VERSION - 1) + 1
        )

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
        snapshot, edit = self._read_published(logged)
        if edit is None:
            return snapshot
        if (
            self._read_log().transaction != logged.transaction
        ):  # the other publisher removed the list of shards
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
            bounds = row.get("min.shard") or "", row.get("max.shard") or _MAX_CHARACTER
            files.append(DataFile(unquote(row["path"]), row["size_bytes"], *bounds))
        transaction = table.transaction_version(self._app_id)
        if transaction is None:
            transaction = _TOKENS_PER_VERSION * max(
                (row.get("max.published") or 0 for row in rows), default=0
            )
        return Snapshot(transaction, (*files,), delta_version=table.version())

    def _read_published(self, logged: Snapshot) -> tuple[Snapshot, str | None]:
        """Adds the list of shards to a version; returns also how the table was edited, or None."""
        if not logged.transaction % _TOKENS_PER_VERSION:
            return logged, "the table's log contains no publication of this model" if logged.files else None
        uri = self._shards_uri(logged)
        try:
            table = read_table(io.BytesIO(self.storage.read(uri)))
        except ObjectNotFound:
            return logged, f"the list of shards is missing: {uri}"
        published_files = json.loads(table.schema.metadata[_METADATA_KEY])["files"]
        is_unchanged = {file.path for file in logged.files} == {*published_files}
        snapshot = replace(logged, shards=table.select(SHARDS_SCHEMA.names).cast(SHARDS_SCHEMA))
        return snapshot, None if is_unchanged else self._find_edit(snapshot.transaction)

    def _find_edit(self, transaction: int) -> str | None:
        """Describes the edit after a publication; returns None if only maintenance operations ran."""
        base_version: int | None = None
        for entry in self._open().history():
            publication = entry.get("cvt_label")
            if base_version is not None and entry["version"] <= base_version:
                return None
            if publication is None and entry.get("operation") not in _MAINTENANCE_OPERATIONS:
                return f"{entry.get('operation')} in version {entry['version']} of the table"
            if publication is not None and publication["transaction"] == transaction:
                base_version = publication["read"]
        return None if base_version is not None else "the log no longer reaches back to the publication"

    def commit(self, base: Snapshot, snapshot: Snapshot, attempts: int = _COMMIT_ATTEMPTS) -> None:
        """Replaces the current version `base` by `snapshot` in one transaction.

        Raises:
            StorageError: the transaction failed.
            TableChangedError: another publisher committed first, or the attempts are used up.
        """
        from deltalake import CommitProperties, Schema, Transaction
        from deltalake import DeltaTable as Table
        from deltalake.exceptions import DeltaError

        metadata = json.dumps({"files": [file.path for file in snapshot.files]})
        shards = snapshot.shards.replace_schema_metadata({_METADATA_KEY: metadata})
        out = io.BytesIO()
        pq.write_table(shards, out, compression="zstd")
        # Conditional, so that a store that ignores conditions is refused: Delta's log needs them.
        self.storage.update(self._shards_uri(snapshot), lambda _: out.getvalue(), ABSENT)

        transaction, version = snapshot.transaction, base.delta_version
        options = self.storage.object_store_options(self.uri)
        properties = CommitProperties(
            app_transactions=[Transaction(self._app_id, transaction)],
            custom_metadata={"cvt_label": {"transaction": transaction, "read": version or 0}},
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
            if (current.transaction, {*current.files}) != (base.transaction, {*base.files}):
                raise TableChangedError(f"{self.uri}: another publisher committed first") from error
            if attempts <= 1:
                raise TableChangedError(f"{self.uri}: concurrent commits of other models") from error
            # Another writer committed, but changed nothing of this model.
            time.sleep(pause_after(_COMMIT_ATTEMPTS - attempts + 1))
            self.commit(replace(base, delta_version=current.delta_version), snapshot, attempts - 1)

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

        try:
            return deltalake.DeltaTable(
                self.uri, version=version, storage_options=self.storage.object_store_options(self.uri)
            )
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            raise StorageError(
                self.uri, f"cannot be read as a Delta table: {_delta_error_text(error)}"
            ) from None


def _delta_error_text(error: Exception) -> str:
    """Returns deltalake's message in one line, without colors, stack traces and XML tags."""
    text = re.split(r"\n\s*0: ", str(error))[0]
    text = re.sub(r"\x1b\[[0-9;]*m|<[^<>]*>", " ", text)
    return " ".join(text.split())[:300]
