"""One model's rows in a Delta table that is partitioned by model: its files, and the list of their shards.

`deltalake` only writes the log: the files that come and the files that go, in one commit. So no condition
over rows is ever put into words, whatever the keys are. Each commit carries a transaction of an application
that is the model's: of two publishers at once, deltalake refuses the slower one. By the transaction's number,
a publisher knows whether its attempt was committed, and finds the list of shards, which was written before:

    <table>/_cvt_label/model=<name>-<fingerprint8>/<version>-<token>.parquet

Delta's own VACUUM removes data files that no version needs; nothing here does. Where the files are others
than were published, and more than OPTIMIZE and VACUUM happened, somebody edited the table: it is refused.
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
from pipeline.storage import ObjectNotFound, Storage, StorageError

#: What an owner may do with a table between publications: the rows stay the same.
_UPKEEP = {"OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES"}

#: One row per shard in a table, sorted: the version of its prediction file that was published, its rows, and
#: the URI of the partition that they are from. A null `output_version` means that somebody edited the table
#: since: the shard is to be published again.
SHARDS = pa.schema(
    [
        ("shard", pa.string()),
        ("output_version", pa.string()),
        ("rows", pa.int64()),
        ("source", pa.string()),
    ]
)
#: Metadata of the list: the paths of all data files, as JSON.
_NOTES = b"cvt_label.table"

_TOKENS = 2**32  # of a version

#: The last of characters: an upper bound where there is none in the log.
_LAST = "\U0010ffff"


class TableChangedError(Exception):
    """Another publisher was faster: the table is no longer the version that was read."""


@dataclass(frozen=True)
class Snapshot:
    """One model's rows in one version of a table.

    Attributes:
        transaction: number in the log: 2**32 times the version, and a token, which distinguishes attempts at
            the same version and is 0 where no publication is in the log.
        shards: the shards whose rows are in the files, as `SHARDS`.
        delta_version: the table's own version; None where there is no table.
    """

    transaction: int = 0
    files: tuple[DataFile, ...] = ()
    shards: pa.Table = field(default_factory=SHARDS.empty_table)
    delta_version: int | None = None

    @property
    def version(self) -> int:
        """Counts up from 1; 0 before anything is published."""
        return self.transaction // _TOKENS

    @property
    def name(self) -> str:
        """Version and token, for the names of files."""
        return f"{self.version:08d}-{self.transaction % _TOKENS:08x}"

    def successor(self) -> Self:
        """The next version, still without files, with a token of its own."""
        return type(self)(_TOKENS * (self.version + 1) + secrets.randbelow(_TOKENS - 1) + 1)

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
            StorageError: the table can't be read, publishing could harm it, `deltalake` isn't installed, or
                somebody edited the table.
            TableChangedError: another publisher was faster.
        """
        logged = self._logged()
        found, edit = self._published(logged)
        if edit is None:
            return found
        if self._logged().transaction != logged.transaction:  # who has removed the list of shards
            raise TableChangedError(f"{self.uri}: another publisher was faster")
        if not rebuild:
            cause = f"rows of model={self.model} are not as they were published: {edit}"
            raise StorageError(self.uri, f"{cause}; publish every dataset of the model again, with --rebuild")
        unknown = pa.nulls(len(found.shards), pa.string())
        return replace(found, shards=found.shards.set_column(1, SHARDS.field(1), unknown))

    def _logged(self) -> Snapshot:
        """The current version as the log has it, without its shards."""
        if importlib.util.find_spec("deltalake") is None:
            cause = "Delta tables need the package deltalake: pip install 'cvt-label[delta]'"
            raise StorageError(self.uri, cause)
        # Listed first, so that access failures are reported like everywhere.
        listed = self.storage.list(f"{self.uri}/_delta_log")
        table = self._open() if next(listed, None) is not None else None
        if table is None:
            return Snapshot()
        if table.metadata().partition_columns != ["model"]:
            raise StorageError(self.uri, "is a Delta table that is not partitioned by model alone")
        if "deletionVectors" in (table.protocol().writer_features or ()):
            raise StorageError(self.uri, "uses Delta's deletion vectors, which publishing doesn't support")
        logged = pa.table(table.get_add_actions(flatten=True))
        rows = logged.filter(pc.equal(logged["partition.model"], self.model)).to_pylist()
        files = []
        for row in rows:
            bounds = row.get("min.shard") or "", row.get("max.shard") or _LAST
            files.append(DataFile(unquote(row["path"]), row["size_bytes"], *bounds))
        transaction = table.transaction_version(self._app)
        if transaction is None:
            transaction = _TOKENS * max((row.get("max.published") or 0 for row in rows), default=0)
        return Snapshot(transaction, (*files,), delta_version=table.version())

    def _published(self, logged: Snapshot) -> tuple[Snapshot, str | None]:
        """What is known of a version, and how somebody edited it; None where it is as it was published."""
        if not logged.transaction % _TOKENS:
            return logged, "no publication of them is in its log" if logged.files else None
        uri = self._list(logged)
        try:
            table = pq.read_table(io.BytesIO(self.storage.read(uri)))
        except ObjectNotFound:
            return logged, f"the list of their shards is missing, {uri}"
        published = json.loads(table.schema.metadata[_NOTES])["files"]
        is_same = {file.path for file in logged.files} == {*published}
        found = replace(logged, shards=table.select(SHARDS.names).cast(SHARDS))
        return found, None if is_same else self._edit_since(found.transaction)

    def _edit_since(self, transaction: int) -> str | None:
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

    def commit(self, base: Snapshot, snapshot: Snapshot, attempts: int = 20) -> None:
        """Makes `snapshot` the current version in place of `base`, in one transaction; raises as `read`."""
        from deltalake import CommitProperties, Schema, Transaction
        from deltalake import DeltaTable as Table
        from deltalake.exceptions import DeltaError

        notes = json.dumps({"files": [file.path for file in snapshot.files]})
        shards = snapshot.shards.replace_schema_metadata({_NOTES: notes})
        out = io.BytesIO()
        pq.write_table(shards, out, compression="zstd")
        self.storage.write(self._list(snapshot), out.getvalue())

        transaction, version = snapshot.transaction, base.delta_version
        options = self.storage.object_store_options(self.uri)
        properties = CommitProperties(
            app_transactions=[Transaction(self._app, transaction)],
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
            found = self._logged()
            if found.transaction == transaction:
                return  # it was committed, and only its answer was lost
            if found.delta_version == version:
                cause = f"the transaction was not committed: {_said(error)}"
                raise StorageError(self.uri, cause) from error
            if (found.transaction, {*found.files}) != (base.transaction, {*base.files}):
                raise TableChangedError(f"{self.uri}: another publisher was faster") from error
            if attempts <= 1:
                raise TableChangedError(f"{self.uri}: others commit to it all the time") from error
            # Others have committed, but nothing of this model.
            self.commit(replace(base, delta_version=found.delta_version), snapshot, attempts - 1)

    def clean_up(self, snapshot: Snapshot) -> None:
        """Removes the lists of shards of earlier versions, and of attempts at this one that have lost."""
        self.storage.remove_unfinished_writes(self.uri)
        current = self._list(snapshot)
        last = current.removesuffix(".parquet").rpartition("-")[0]
        for uri in [info.uri for info in self.storage.list(current.rpartition("/")[0])]:
            if uri[: len(last)] <= last and uri != current:
                self.storage.delete(uri)

    @property
    def _app(self) -> str:
        return f"cvt-label/model={self.model}"

    def _list(self, snapshot: Snapshot) -> str:
        return f"{self.uri}/_cvt_label/model={self.model}/{snapshot.name}.parquet"

    def _actions(self, before: Snapshot, after: Snapshot) -> list[Any]:
        from deltalake.transaction import AddAction, RemoveAction

        now, partition = time.time_ns() // 10**6, {"model": self.model}
        was, stays = {*before.files}, {*after.files}
        added = [
            AddAction(file.path, file.bytes, partition, now, True, file.statistics)
            for file in after.files
            if file not in was
        ]
        removed = [
            RemoveAction(file.path, True, deletion_timestamp=now, size=file.bytes, partition_values=partition)
            for file in before.files
            if file not in stays
        ]
        return [*added, *removed]

    def _open(self, version: int | None = None) -> Any:
        """The table, in one version or as it is now, with the credentials of now; None where it is none."""
        import deltalake
        from deltalake.exceptions import DeltaError, TableNotFoundError

        try:
            return deltalake.DeltaTable(
                self.uri, version=version, storage_options=self.storage.object_store_options(self.uri)
            )
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            raise StorageError(self.uri, f"can't be read as a Delta table: {_said(error)}") from None


def _said(error: Exception) -> str:
    """What deltalake says, in one line: without colors, stacks, and the tags of what services answer."""
    text = re.split(r"\n\s*0: ", str(error))[0]
    text = re.sub(r"\x1b\[[0-9;]*m|<[^<>]*>", " ", text)
    return " ".join(text.split())[:300]
