"""Files of tables: Parquet, CSV, JSON Lines, one URI per line, and the files of an S3 Inventory."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.read.compression import DecompressedFile, find_compression
from pipeline.read.snapshots import DataFile
from pipeline.storage import ObjectInfo, Storage, StorageError, content_errors

#: Columns that a file adds to those of the table: why a line is no row, and the version of the row's object.
ERROR, VERSION = "cvt_label_error", "cvt_label_version"
_NAME = re.compile(r"\.(parquet|csv|tsv|jsonl|ndjson|txt)(\.(gz|zst|bz2|xz|lz4))?$", re.I)
#: Endings of the names of tables.
TABLE_SUFFIXES = tuple(
    f".{kind}{compression}"
    for kind in ("parquet", "csv", "tsv", "jsonl", "ndjson", "txt")
    for compression in ("", ".gz", ".zst", ".bz2", ".xz", ".lz4")
)
_BATCH_ROWS, _MAX_LINE_BYTES = 1000, 16 * 1024**2


def open_file(storage: Storage, info: ObjectInfo, csv_columns: Sequence[str] | None) -> DataFile:
    """Opens a file of a table. The name determines the format; without a known extension, the content does.

    Raises `StorageError` if the file cannot be read.
    """
    folder = info.uri.rpartition("/")[0]
    while "=" in folder.rpartition("/")[2]:  # a Hive partition
        folder = folder.rpartition("/")[0]
    with _file_errors(info.uri), storage.open(info.uri, info.version) as stream:
        found, start = _NAME.search(info.uri), stream.peek(4)[:4]
        if found is None:
            kind = "jsonl" if start[:1] in (b"{", b"[") else "txt" if csv_columns is None else "csv"
        kind = found[1].lower() if found else "parquet" if start == b"PAR1" else kind
        if kind == "parquet":
            schema = pq.ParquetFile(stream, pre_buffer=False).schema_arrow
            return DataFile(info.uri, folder, schema, lambda columns: _read_parquet(storage, info, columns))

    def records() -> Iterator[dict[str, Any] | str]:
        with _file_errors(info.uri), storage.open(info.uri, info.version) as stream:
            lines = _read_lines(stream)
            if kind in ("csv", "tsv"):
                yield from _parse_csv(lines, csv_columns)
            elif kind == "txt":
                yield from ({"uri": line.strip()} for line in lines if line.strip())
            else:
                yield from _parse_json(lines)

    def read(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        found = records()
        while batch := [*islice(found, _BATCH_ROWS)]:
            rows = [row if isinstance(row, dict) else {} for row in batch]
            arrays = [_to_array([row.get(name) for row in rows]) for name in columns]
            errors = pa.array([row if isinstance(row, str) else None for row in batch], pa.string())
            yield pa.RecordBatch.from_arrays([*arrays, errors], [*columns, ERROR])

    first = list(islice(records(), _BATCH_ROWS))
    names = dict.fromkeys(name for row in first if isinstance(row, dict) for name in row)
    if first and not names:
        raise StorageError(info.uri, f"not a table of the format {kind}: {first[0]}")
    return DataFile(info.uri, folder, pa.schema([(name, pa.string()) for name in names]), read)


def open_inventory(storage: Storage, uri: str, selects: Callable[[str, bool], bool]) -> list[DataFile]:
    """Opens the files of an S3 Inventory, given the URI of its `manifest.json`.

    Their columns are `uri`, those of the inventory, and `VERSION`. `selects` is called with each URI and
    whether the row is the current version of an object, and selects the rows.
    """
    with content_errors(uri, "the manifest of an S3 Inventory"):
        manifest = json.loads(storage.read(uri, max_bytes=_MAX_LINE_BYTES))
        bucket, format = manifest["destinationBucket"].rpartition(":")[2], manifest["fileFormat"]
        if format not in ("CSV", "Parquet"):
            raise ValueError(f"its files have the format {format}; choose CSV or Parquet for the inventory")
        names = [name.strip() for name in manifest["fileSchema"].split(",")] if format == "CSV" else None
        files = [f"s3://{bucket}/{file['key']}" for file in manifest["files"]]
    folder = uri.rsplit("/", 2)[0]  # has a folder for each date
    opened = (_open_inventory_file(storage, name, names, selects) for name in files)
    return [file._replace(table=folder) for file in opened]


def _open_inventory_file(
    storage: Storage, uri: str, names: Sequence[str] | None, selects: Callable[[str, bool], bool]
) -> DataFile:
    file = open_file(storage, storage.stat(uri), names)
    roles = {name.replace("_", "").lower(): name for name in file.schema.names}  # ETag, e_tag

    def read(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        others = [name for name in columns if name != "uri"]
        for batch in file.read([*roles.values()]):
            values = {role: batch[name].to_pylist() for role, name in roles.items()}
            nulls = [None] * len(batch)
            keys = [unquote_plus(key or "") for key in values["key"]] if names else values["key"]
            uris = [f"s3://{bucket}/{key}" for bucket, key in zip(values["bucket"], keys, strict=True)]
            tags = zip(values.get("etag", nulls), values.get("size", nulls), strict=True)
            versions = [f"{tag}-{size}" if tag and size is not None else None for tag, size in tags]
            states = zip(values.get("islatest", nulls), values.get("isdeletemarker", nulls), strict=True)
            live = [str(latest).lower() != "false" and str(gone).lower() != "true" for latest, gone in states]
            kept = pa.array(map(selects, uris, live), pa.bool_())
            arrays = [pa.array(uris), pa.array(versions, pa.string()), *(batch[name] for name in others)]
            yield pa.RecordBatch.from_arrays(arrays, ["uri", VERSION, *others]).filter(kept)

    return file._replace(schema=pa.schema([("uri", pa.string()), *file.schema]), read=read)


@contextmanager
def _file_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # each format has its own classes
        raise StorageError(uri, f"cannot be read as a table: {type(error).__name__}: {error}") from error


def _read_parquet(storage: Storage, info: ObjectInfo, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with _file_errors(info.uri), storage.open(info.uri, info.version) as stream:
        file = pq.ParquetFile(stream, pre_buffer=False)
        yield from file.iter_batches(_BATCH_ROWS, columns=[*columns], use_threads=False)


def _read_lines(stream: Any) -> Iterator[str]:
    """Yields the lines of a text, decompressed if necessary."""
    compression = find_compression(stream.peek(10))
    file = stream if compression is None else DecompressedFile(stream, compression)
    rest, is_first = b"", True
    while block := file.read(1024**2):
        *lines, rest = (rest + block).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            raise ValueError("a line has more than 16 MiB")
        for line in lines:
            yield line.decode("utf-8-sig" if is_first else "utf-8", "backslashreplace") + "\n"
            is_first = False
    if rest:
        yield rest.decode("utf-8-sig" if is_first else "utf-8", "backslashreplace")


def _parse_csv(lines: Iterator[str], columns: Sequence[str] | None) -> Iterator[dict[str, Any] | str]:
    """Yields the rows; empty fields are null. The separator is a comma, a tab, `;` or `|`."""
    first = next(lines, "")
    separators = ",\t;|"
    separator = max(separators, key=first.count)
    if columns is not None:
        separator = next((x for x in separators if first.count(x) == len(columns) - 1), separator)
    reader = csv.reader(chain([first], lines), delimiter=separator)
    names = columns or next(reader, [])
    for fields in reader:
        if len(fields) == len(names):
            yield {name: value or None for name, value in zip(names, fields, strict=True)}
        elif fields:
            yield f"line {reader.line_num:,} has {len(fields)} fields, and the table has {len(names)} columns"


def _parse_json(lines: Iterator[str]) -> Iterator[dict[str, Any] | str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        yield value if isinstance(value, dict) else f"line {number:,} is not a JSON object"


def _to_array(values: list[Any]) -> pa.Array:
    """Returns values as a column, as text if their types differ."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())
