"""A consumer table of plain Parquet: immutable data files, and a pointer that names those that count.

    <target>/model=<name>-<fingerprint8>/
      current.json                        the current version: its data files, and which earlier ones are kept
      versions/<version>-<token>.json     what current.json was when that version was the current one
      versions/<version>-<token>.parquet  its shards: one row each
      data/<version>-<token>-<n>.parquet  rows

A reader looks at `current.json`, and reads the files that it names. They stay for as many versions as are
kept. Replacing `current.json`, on condition that it is still what was read, is what makes a version; all
else is written before it, under names of its own, and without it means nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.publish.publishing import NOTHING, SHARDS, DataFile, Snapshot, TableChangedError
from pipeline.storage import ABSENT, BucketNotFound, ObjectChanged, ObjectNotFound, Storage, StorageError

#: Versions whose files are kept, the current one among them.
KEEP = 10


class ParquetTable:
    """One model's table of plain Parquet.

    Attributes:
        uri: where it lies.
    """

    def __init__(self, storage: Storage, target: str, model: str, keep: int = KEEP) -> None:
        """Args:
        storage: access to it.
        target: URI of the folder of tables.
        model: the partition's name and the beginning of its fingerprint.
        keep: versions whose files are kept, the current one among them.
        """
        self.uri = f"{target}/model={model}"
        self._storage = storage
        self._model = model
        self._keep = keep
        self._pointer = f"{self.uri}/current.json"
        self._found = ABSENT
        self._current: dict[str, Any] = {}

    def schema(self, predictions: pa.Schema) -> pa.Schema:
        """The columns: those of the predictions, but none in half precision: Spark refuses such files."""
        return pa.schema([_in_single_precision(column) for column in predictions])

    def data_path(self, name: str) -> str:
        """Where a data file goes."""
        return f"data/{name}"

    def read(self) -> Snapshot:
        """The current version.

        Raises:
            StorageError: it can't be read, or is none.
        """
        while True:
            self._load()
            if not self._current:
                return NOTHING
            try:
                return self._snapshot()
            except ObjectNotFound:  # removed, if somebody has published since
                found = self._found
                self._load()
                if self._found == found:
                    raise

    def commit(self, base: Snapshot, snapshot: Snapshot) -> None:
        """Makes a version the current one; see `ConsumerTable`."""
        rows = sum(file.rows for file in snapshot.files)
        if rows != snapshot.rows:
            raise StorageError(self.uri, f"its files hold {rows} rows, and its shards {snapshot.rows}")
        name = f"versions/{_name(snapshot)}"
        content = {
            "version": snapshot.version,
            "token": snapshot.token,
            "model": self._model,
            "published_at": datetime.now(UTC).isoformat(),
            "rows": snapshot.rows,
            "columns": snapshot.columns,
            "files": [asdict(file) for file in snapshot.files],
            "shards": f"{name}.parquet",
            "kept": self._kept(base),
        }
        data = json.dumps(content, indent=2).encode()
        self._storage.write(f"{self.uri}/{name}.parquet", _shards_file(snapshot))
        self._storage.write(f"{self.uri}/{name}.json", data)
        try:
            self._storage.write(self._pointer, data, self._found)
        except ObjectChanged:
            # Where an answer was lost, it may have been this very write.
            self._load()
            if self._current.get("token") != snapshot.token:
                raise TableChangedError(f"{self._pointer}: another publisher was faster") from None

    def tidy(self, snapshot: Snapshot) -> None:
        """Removes data files and versions that neither the current version nor a kept one names.

        Only what has the number of this version or an earlier one: a later number may be that of another
        publisher who is at work; one that has this version's number has lost.
        """
        self._storage.sweep(self.uri)
        self._load()
        if self._current.get("token") != snapshot.token:
            return  # there is none yet, or another publisher is ahead, and tidies up itself
        kept = [self._current, *self._versions(self._current["kept"])]
        needed = {file["path"] for content in kept for file in content["files"]}
        for content in kept:
            needed |= {content["shards"], content["shards"].removesuffix(".parquet") + ".json"}
        found = [info.uri for folder in ("data", "versions") for info in self._list(folder)]
        names = [uri.removeprefix(f"{self.uri}/") for uri in found]
        lost = [name for name in names if name not in needed and _number(name) <= snapshot.version]
        with ThreadPoolExecutor(16, thread_name_prefix="tidy") as pool:
            list(pool.map(lambda name: self._storage.delete(f"{self.uri}/{name}"), lost))

    def _load(self) -> None:
        """Reads the pointer."""
        while True:
            try:
                self._found = self._storage.stat(self._pointer).version
                self._current = _parsed(self._pointer, self._storage.read(self._pointer, self._found))
            except BucketNotFound:
                raise
            except ObjectChanged:
                continue
            except ObjectNotFound:
                self._found, self._current = ABSENT, {}
            return

    def _snapshot(self) -> Snapshot:
        content = self._current
        uri = f"{self.uri}/{content['shards']}"
        try:
            table = pq.read_table(io.BytesIO(self._storage.read(uri)), schema=SHARDS)
        except pa.ArrowInvalid as error:
            raise StorageError(uri, f"not the shards of a table: {error}") from None
        return Snapshot(
            content["version"],
            content["token"],
            tuple(content["columns"]),
            tuple(DataFile(**file) for file in content["files"]),
            table,
        )

    def _kept(self, base: Snapshot) -> list[dict[str, Any]]:
        if not base.version:
            return []
        last = {"version": base.version, "path": f"versions/{_name(base)}.json"}
        kept: list[dict[str, Any]] = [last, *self._current["kept"]]
        return kept[: self._keep - 1]

    def _versions(self, kept: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        versions = []
        for entry in kept:
            uri = f"{self.uri}/{entry['path']}"
            with suppress(ObjectNotFound):  # removed by hand
                versions.append(_parsed(uri, self._storage.read(uri)))
        return versions

    def _list(self, folder: str) -> Iterable[Any]:
        try:
            yield from self._storage.list(f"{self.uri}/{folder}")
        except ObjectNotFound:
            return


def _in_single_precision(column: pa.Field) -> pa.Field:
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        return column.with_type(pa.list_(pa.float32(), kind.list_size))
    return column


def _shards_file(snapshot: Snapshot) -> bytes:
    out = io.BytesIO()
    pq.write_table(snapshot.shards, out, compression="zstd")
    return out.getvalue()


def _name(snapshot: Snapshot) -> str:
    return f"{snapshot.version:08d}-{snapshot.token}"


def _number(name: str) -> int:
    """The version that an object was written for; its name is relative to the table."""
    digits = name.rpartition("/")[2].partition("-")[0]
    return int(digits) if digits.isdecimal() else 2**63  # somebody else's


def _parsed(uri: str, data: bytes) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(data)
        missing = {"version", "token", "columns", "files", "shards", "kept"} - content.keys()
    except (ValueError, AttributeError) as error:
        raise StorageError(uri, f"not a version of a table: {error}") from None
    if missing:
        raise StorageError(uri, f"not a version of a table: it has no {', '.join(sorted(missing))}")
    return content
