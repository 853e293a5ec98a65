"""The log of a Delta table, as far as one model's files are concerned.

`deltalake` only writes the log: files that come and files that go, in one commit. So no condition over rows
is ever put into words, whatever the keys are. Each commit carries a transaction of an application that is the
model's: of two publishers at once, deltalake refuses the slower one.
"""

import importlib.util
import re
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.publish.data_files import DataFile, table_schema
from pipeline.storage import Storage, StorageError

#: What an owner may do with a table between publications: the rows stay the same.
_UPKEEP = {"OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES"}

#: How often a commit is tried while others, who don't concern it, are faster.
_COMMITS = 20

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

_TOKEN_BITS = 32

#: The last of characters: an upper bound where there is none in the log.
_LAST = "\U0010ffff"


class TableChangedError(Exception):
    """Another publisher was faster: the table is no longer the version that was read."""


@dataclass(frozen=True)
class Snapshot:
    """One model's rows in one version of a table.

    Attributes:
        version: counts up from 1; 0 before anything is published.
        token: distinguishes attempts at the same version; empty where no publication is in the log.
        shards: the shards whose rows are in the files, as `SHARDS`.
        delta_version: the table's own version; None where there is no table.
    """

    version: int = 0
    token: str = ""
    columns: tuple[str, ...] = ()
    files: tuple[DataFile, ...] = ()
    shards: pa.Table = field(default_factory=SHARDS.empty_table)
    delta_version: int | None = None

    @property
    def transaction(self) -> int:
        """Version and token as the number of a transaction in the log."""
        return (self.version << _TOKEN_BITS) | int(self.token or "0", 16)

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        total: int = pc.sum(self.shards["rows"]).as_py() or 0
        return total


@dataclass(frozen=True)
class DeltaLog:
    """The log of a Delta table that is partitioned by model, as far as one model is concerned."""

    storage: Storage
    uri: str
    model: str

    def read(self) -> Snapshot:
        """Reads the current version, without its columns and shards.

        Raises:
            StorageError: the table can't be read, publishing could harm it, or `deltalake` isn't installed.
        """
        if importlib.util.find_spec("deltalake") is None:
            cause = "Delta tables need the package deltalake: pip install 'cvt-label[delta]'"
            raise StorageError(self.uri, cause)
        # Listed first, so that access failures are reported like everywhere.
        listed = self.storage.list(f"{self.uri}/_delta_log", missing_ok=True)
        table = self._open() if next(listed, None) is not None else None
        if table is None:
            return Snapshot()
        if table.metadata().partition_columns != ["model"]:
            raise StorageError(self.uri, "is a Delta table that is not partitioned by model alone")
        if "deletionVectors" in (table.protocol().writer_features or ()):
            raise StorageError(self.uri, "uses Delta's deletion vectors, which publishing doesn't support")
        logged = pa.table(table.get_add_actions(flatten=True))
        rows = logged.filter(pc.equal(logged["partition.model"], self.model)).to_pylist()
        files = tuple(
            DataFile(
                unquote(row["path"]),
                row["size_bytes"],
                row.get("min.shard") or "",
                row.get("max.shard") or _LAST,
            )
            for row in rows
        )
        number = table.transaction_version(self._app)
        if number is None:
            last = max((row.get("max.published") or 0 for row in rows), default=0)
            return Snapshot(last, files=files, delta_version=table.version())
        version, token = number >> _TOKEN_BITS, f"{number % 2**_TOKEN_BITS:08x}"
        return Snapshot(version, token, files=files, delta_version=table.version())

    def edit_since(self, transaction: int) -> str | None:
        """Describes what changed files since a publication; None if nothing but upkeep did."""
        since: int | None = None
        for entry in self._open().history():
            mark = entry.get("cvt_label")
            if since is not None and entry["version"] <= since:
                return None
            if mark is None and entry.get("operation") not in _UPKEEP:
                return f"{entry.get('operation')} in version {entry['version']} of the table"
            if mark is not None and mark["transaction"] == transaction:
                since = mark["read"]
        return None if since is not None else "and the log no longer has what happened since"

    def commit(self, base: Snapshot, snapshot: Snapshot) -> None:
        """Replaces the files of `base`, the version that was read last, in one transaction.

        Raises:
            TableChangedError: the current version has other files of the model.
            StorageError: the transaction can't be written.
        """
        from deltalake import CommitProperties, DeltaTable, Schema, Transaction
        from deltalake.exceptions import DeltaError

        version, transaction = base.delta_version, snapshot.transaction
        properties = CommitProperties(
            app_transactions=[Transaction(self._app, transaction)],
            custom_metadata={"cvt_label": {"transaction": transaction, "read": version or 0}},
        )
        # With embeddings, since other models may have some.
        schema = Schema.from_arrow(table_schema(embedding=True).append(pa.field("model", pa.string())))
        actions = self._actions(base.files, snapshot.files)
        for _ in range(_COMMITS):
            try:
                if version is None:
                    options = self._options()
                    DeltaTable.create(self.uri, schema, partition_by=["model"], storage_options=options)
                self._open(version or 0).create_write_transaction(
                    actions, "append", schema, ["model"], commit_properties=properties
                )
                return
            except (DeltaError, OSError) as error:
                found = self.read()
                if found.transaction == transaction:
                    return  # it was committed, and only its answer was lost
                if found.delta_version == version:
                    cause = f"the transaction was not committed: {_said(error)}"
                    raise StorageError(self.uri, cause) from error
                if (found.transaction, {*found.files}) != (base.transaction, {*base.files}):
                    break
                version = found.delta_version  # others have committed, but nothing of this model
        raise TableChangedError(f"{self.uri}: another publisher was faster")

    @property
    def _app(self) -> str:
        return f"cvt-label/model={self.model}"

    def _actions(self, before: tuple[DataFile, ...], after: tuple[DataFile, ...]) -> list[Any]:
        from deltalake.transaction import AddAction, RemoveAction

        now, partition = time.time_ns() // 10**6, {"model": self.model}
        was, stays = {file.path for file in before}, {file.path for file in after}
        added = [
            AddAction(file.path, file.bytes, partition, now, True, file.statistics)
            for file in after
            if file.path not in was
        ]
        removed = [
            RemoveAction(file.path, True, deletion_timestamp=now, size=file.bytes, partition_values=partition)
            for file in before
            if file.path not in stays
        ]
        return [*added, *removed]

    def _open(self, version: int | None = None) -> Any:
        """The table, in one version or as it is now, with the credentials of now; None where it is none."""
        import deltalake
        from deltalake.exceptions import DeltaError, TableNotFoundError

        try:
            return deltalake.DeltaTable(self.uri, version=version, storage_options=self._options())
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            raise StorageError(self.uri, f"can't be read as a Delta table: {_said(error)}") from None

    def _options(self) -> dict[str, str] | None:
        """How deltalake reaches the storage: as this project does."""
        if not self.uri.startswith("s3://"):
            return None
        found = self.storage.s3_access()
        options = {
            "endpoint_url": found.endpoint_url,
            "allow_http": "true" if (found.endpoint_url or "").startswith("http://") else None,
            "region": found.region,
            "aws_access_key_id": found.access_key,
            "aws_secret_access_key": found.secret_key,
            "aws_session_token": found.token,
        }
        return {name: value for name, value in options.items() if value}


def _said(error: Exception) -> str:
    """What deltalake says, in one line: without colors, stacks, and the tags of what services answer."""
    text = re.split(r"\n\s*0: ", str(error))[0]
    text = re.sub(r"\x1b\[[0-9;]*m|<[^<>]*>", " ", text)
    return " ".join(text.split())[:300]
