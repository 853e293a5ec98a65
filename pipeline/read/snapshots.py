"""Snapshots of Delta and Iceberg tables: the live data files, without their deleted rows.

Files that are in the table's folder and not in the snapshot are never read.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from pipeline.read.table_files import DataFile, normalize_location, read_parquet
from pipeline.storage import ObjectInfo, Storage, StorageError, library_errors, require_package

_METADATA_FILE = re.compile(r"/v?(\d+)(?:-[^/]*)?(?:\.gz)?\.metadata\.json(?:\.gz)?$")
_COMPACT = "rewrite the files, with REORG TABLE ... APPLY (PURGE) in Delta or rewrite_data_files in Iceberg"
#: Features of Delta tables that need nothing more from a reader, or whose use `_open_delta` refuses.
_DELTA_FEATURES = {"columnMapping", "deletionVectors", "timestampNtz", "v2Checkpoint", "vacuumProtocolCheck"}
_DELTA_FEATURES |= {"typeWidening", "variantType"}
#: pyiceberg's names of the options of Rust's object_store.
_ICEBERG_OPTIONS = {
    "endpoint_url": "s3.endpoint",
    "region": "s3.region",
    "aws_access_key_id": "s3.access-key-id",
    "aws_secret_access_key": "s3.secret-access-key",
    "aws_session_token": "s3.session-token",
    "aws_skip_signature": "s3.anonymous",
}


def open_snapshot(storage: Storage, uri: str) -> list[DataFile]:
    """Returns the live files of the Delta or Iceberg table in a folder, or of an Iceberg `.metadata.json`.

    Raises `StorageError` if the table cannot be read, or if the package of its format is missing.
    """
    if _METADATA_FILE.search(uri):
        return _open_iceberg(storage, uri)
    if next(storage.list(f"{uri}/_delta_log"), None) is not None:
        return _open_delta(storage, uri)
    by_number = defaultdict[int, list[str]](list)
    for info in storage.list(f"{uri}/metadata"):
        if match := _METADATA_FILE.search(info.uri):
            by_number[int(match[1])].append(info.uri)
    newest = by_number[max(by_number, default=0)]
    if len(newest) != 1:
        cause = f"the newest version has {len(newest)} metadata files: {', '.join(sorted(newest))}"
        raise StorageError(uri, f"{cause}; set input.uri to the metadata file that the catalog names")
    return _open_iceberg(storage, newest[0])


def snapshot_files(storage: Storage, uri: str) -> list[ObjectInfo]:
    """Returns the live Parquet files of the Delta or Iceberg table at a URI, sorted by URI.

    Raises:
        StorageError: The table cannot be read, rows of a live file are deleted, or a file is in
            another folder.
    """
    files = open_snapshot(storage, uri)
    if deleted := [file.uri for file in files if file.has_deletes]:
        cause = f"{len(deleted)} files of the table have deleted rows, such as {deleted[0]}"
        raise StorageError(uri, f"{cause}; {_COMPACT}")
    live = {file.uri for file in files}
    found = [info for info in storage.list(uri) if info.uri in live]
    if missing := sorted(live.difference(info.uri for info in found)):
        raise StorageError(missing[0], f"not in the folder of its table, {uri}")
    return found


def _open_delta(storage: Storage, uri: str) -> list[DataFile]:
    with _table_errors(uri, "Delta", "deltalake", "delta"):
        import deltalake

        table = deltalake.DeltaTable(uri, storage_options=storage.object_store_options(uri))
        actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
        problems = {*(table.protocol().reader_features or ())} - _DELTA_FEATURES
        if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
            problems.add("columnMapping")
        if "deletionVectors" in (table.protocol().reader_features or ()):
            problems |= {"deletionVectors"} if pa.table(table.deletion_vectors()).num_rows else set()
        schema = pa.schema(table.schema())
    if problems:
        cause = f"the Delta table uses features that are not supported: {', '.join(sorted(problems))}"
        raise StorageError(uri, f"{cause}; {_COMPACT}, or copy the table without them")

    def file(action: Mapping[str, Any]) -> DataFile:
        path = action["path"]
        name = normalize_location(path) if "://" in path else f"{uri}/{unquote(path)}"
        partition = {x.name: pa.scalar(action.get(f"partition.{x.name}"), x.type) for x in schema}
        return DataFile(name, uri, schema, partial(read_parquet, storage, name, None, partition), table=uri)

    return [file(action) for action in actions]


def _open_iceberg(storage: Storage, uri: str) -> list[DataFile]:
    options = storage.object_store_options(uri)
    properties = {name: options[other] for other, name in _ICEBERG_OPTIONS.items() if other in options}
    with _table_errors(uri, "Iceberg", "pyiceberg", "iceberg"):
        from pyiceberg.expressions import AlwaysTrue
        from pyiceberg.io.pyarrow import ArrowScan, schema_to_pyarrow
        from pyiceberg.table import StaticTable

        table = StaticTable.from_metadata(uri, properties)
        tasks = list(table.scan().plan_files()) if table.current_snapshot() else []
        schema = schema_to_pyarrow(table.schema(), include_field_ids=False)

    def file(task: Any) -> DataFile:
        def read(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
            scan = ArrowScan(table.metadata, table.io, table.schema().select(*columns), AlwaysTrue())
            for batch in scan.to_record_batches([task]):
                yield batch.select(list(columns))

        name = normalize_location(task.file.file_path)
        return DataFile(name, folder, schema, read, bool(task.delete_files), folder)

    folder = normalize_location(table.location())
    return [file(task) for task in tasks]


@contextmanager
def _table_errors(uri: str, format: str, package: str, extra: str) -> Iterator[None]:
    require_package(package, extra, uri)
    try:
        with library_errors(uri, f"the {format} table cannot be read"):
            yield
    except StorageError as error:
        if "deletes" in error.cause:
            raise StorageError(uri, f"{error.cause}; {_COMPACT}") from error
        raise
