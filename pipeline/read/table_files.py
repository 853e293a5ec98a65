"""Files of tables: Parquet, CSV, JSON Lines, one URI per line, and the files of an S3 Inventory."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline.read.compression import DecompressedFile, find_compression
from pipeline.read.shards import (
    IMAGE_EXTENSIONS,
    TABLE_SUFFIXES,
    IgnoreReason,
    file_extension,
    table_suffix,
)
from pipeline.storage import ObjectInfo, Storage, StorageError, content_errors, normalize_uri

#: The column of an inventory's file with the versions of the objects.
VERSION = "cvt_label_version"
_BATCH_ROWS, _MAX_LINE_BYTES = 1000, 16 * 1024**2
#: Schemes as Hadoop and others write them.
SPELLINGS = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}
#: What to do about an error of Arrow, by a part of its message.
_REMEDIES = {
    "columns, got": "correct the line, or set input.csv_columns to the names of all columns",
    "invalid UTF8": "convert the file to UTF-8",
}


class DataFile(NamedTuple):
    """A file of a table.

    Attributes:
        uri: URI of the file.
        folder: The folder to which URIs in the table are relative.
        schema: Columns of the table.
        read: Yields the rows of these columns, without deleted rows.
        has_deletes: Whether rows of the file are deleted.
        table: The folder of the Delta or Iceberg table, or of the S3 Inventories, that the file is part of.
    """

    uri: str
    folder: str
    schema: pa.Schema
    read: Callable[[Sequence[str]], Iterator[pa.RecordBatch]]
    has_deletes: bool = False
    table: str | None = None


def open_file(storage: Storage, info: ObjectInfo, csv_columns: Sequence[str] | None) -> DataFile:
    """Opens a file of a table. The name determines the format; without a known extension, the content does.

    Raises `StorageError` if the file cannot be read.
    """
    folder = info.uri.rpartition("/")[0]
    while "=" in folder.rpartition("/")[2]:  # a Hive partition
        folder = folder.rpartition("/")[0]
    with _file_errors(info.uri), storage.open(info.uri, info.version) as stream:
        suffix, start = table_suffix(info.uri), stream.peek(4)[:4]
        empty = DataFile(info.uri, folder, pa.schema([]), lambda columns: iter(()))
        if not start:
            return empty
        if suffix not in TABLE_SUFFIXES:
            text_suffix = ".json" if start[:1] in (b"{", b"[") else ".csv" if csv_columns else ".txt"
            suffix = ".parquet" if start == b"PAR1" else text_suffix
        if suffix == ".parquet":
            schema = pq.ParquetFile(stream, pre_buffer=False).schema_arrow
            read_columns = partial(read_parquet, storage, info.uri, info.version, {})
            return DataFile(info.uri, folder, schema, read_columns)
        text = _decompressed(stream).read(_MAX_LINE_BYTES).decode("utf-8-sig", "replace")
    line = next(filter(None, text.splitlines()), None)
    if line is None:  # such as the compressed file of a partition without rows
        return empty
    is_csv = suffix in (".csv", ".tsv")
    separator = max(",\t" if csv_columns else ",\t;|", key=line.count) if is_csv else "\1"
    names = csv_columns if is_csv else ["uri"]  # a line of another text is one value
    header = names or next(csv.reader([line], delimiter=separator))
    schema = pa.schema([(name, pa.string()) for name in header])

    def read(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        quote: Any = is_csv and '"'
        with _file_errors(info.uri), storage.open(info.uri, info.version) as stream:
            yield from pa_csv.open_csv(
                _decompressed(stream),
                pa_csv.ReadOptions(use_threads=False, block_size=_MAX_LINE_BYTES, column_names=names),
                pa_csv.ParseOptions(delimiter=separator, quote_char=quote, newlines_in_values=bool(quote)),
                pa_csv.ConvertOptions(
                    column_types=schema, include_columns=columns, strings_can_be_null=True, null_values=[""]
                ),
            )

    file = DataFile(info.uri, folder, schema, read)
    return _parse_json(file) if "json" in suffix else file


def normalize_location(location: str) -> str:
    """Returns the normalized URI of a location, whose scheme Hadoop may have written, such as `s3a://b/c`."""
    scheme, separator, rest = location.partition("://")
    scheme = SPELLINGS.get(scheme.lower(), scheme.lower())
    return normalize_uri(f"{scheme}://{rest}" if separator else location)


def _parse_json(file: DataFile) -> DataFile:
    """Returns the table of the objects in the lines of a file. Arrow's reader crashes on deep nesting."""

    def objects() -> Iterator[list[dict[str, Any]]]:
        for batch in file.read(["uri"]):
            try:
                rows = [json.loads(line) for line in batch["uri"].to_pylist() if line.strip()]
            except (ValueError, RecursionError):
                rows = [None]
            if not all(isinstance(row, dict) for row in rows):
                remedy = "write JSON Lines, or exclude the file (input.exclude)"
                raise StorageError(file.uri, f"a line is not a JSON object of its own; {remedy}")
            yield rows

    def read(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for rows in objects():
            arrays = []
            for name in columns:
                with _file_errors(file.uri, f"the column {name!r} must have one type: "):
                    arrays.append(pa.array([row.get(name) for row in rows]))
            yield pa.RecordBatch.from_arrays(arrays, [*columns])

    names = dict.fromkeys(name for row in next(objects(), []) for name in row)
    return file._replace(schema=pa.schema([(name, pa.string()) for name in names]), read=read)


def open_inventory(
    storage: Storage, uri: str, ignore: Callable[[str, IgnoreReason], None]
) -> Iterator[DataFile]:
    """Opens the files of an S3 Inventory, given the URI of its `manifest.json`.

    Their columns are `uri`, those of the inventory, and `VERSION`. `ignore` is called with each object that
    is no image or not current; these rows are left out.
    """
    with content_errors(uri, "the manifest of an S3 Inventory"):
        manifest = json.loads(storage.read(uri, max_bytes=_MAX_LINE_BYTES))
        bucket, format = manifest["destinationBucket"].rpartition(":")[2], manifest["fileFormat"]
        if format not in ("CSV", "Parquet"):
            raise ValueError(f"its files have the format {format}; choose CSV or Parquet for the inventory")
        names = [name.strip() for name in manifest["fileSchema"].split(",")] if format == "CSV" else None
        files = [f"s3://{bucket}/{file['key']}" for file in manifest["files"]]
    folder = uri.rsplit("/", 2)[0]  # has a folder for each date
    for name in files:
        file = open_file(storage, storage.stat(name), names)
        schema = pa.schema([("uri", pa.string()), *file.schema])
        read = partial(_read_inventory, file, names is not None, ignore)
        yield file._replace(table=folder, schema=schema, read=read)


def _read_inventory(
    file: DataFile, is_csv: bool, ignore: Callable[[str, IgnoreReason], None], columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    roles = [name.replace("_", "").lower() for name in file.schema.names]  # ETag, e_tag
    for batch in file.read(file.schema.names):
        uris, versions, kept = list[str](), list[str | None](), list[bool]()
        for row in batch.rename_columns(roles).to_pylist():
            key = unquote_plus(row["key"] or "") if is_csv else row["key"]
            uris.append(f"s3://{row['bucket']}/{key}")
            tag, size = row.get("etag"), row.get("size")
            versions.append(f"{tag}-{size}" if tag and size is not None else None)
            is_old = str(row.get("islatest")).lower() == "false"
            is_old |= str(row.get("isdeletemarker")).lower() == "true"
            kept.append(not is_old and file_extension(uris[-1])[1:] in IMAGE_EXTENSIONS)
            if not kept[-1]:
                ignore(uris[-1], IgnoreReason.OLD_VERSION if is_old else IgnoreReason.FORMAT)
        table = pa.table(batch).append_column("uri", [uris])
        table = table.append_column(VERSION, [pa.array(versions, pa.string())])
        yield from table.select([*columns, VERSION]).filter(pa.array(kept, pa.bool_())).to_batches()


@contextmanager
def _file_errors(uri: str, problem: str = "") -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # each format has its own classes
        remedy = "".join(f"; {remedy}" for text, remedy in _REMEDIES.items() if text in str(error))
        cause = f"cannot be read as a table: {problem}{type(error).__name__}: {error}{remedy}"
        raise StorageError(uri, cause) from error


def read_parquet(
    storage: Storage,
    uri: str,
    version: str | None,
    missing: Mapping[str, pa.Scalar],
    columns: Sequence[str],
) -> Iterator[pa.RecordBatch]:
    """Yields the columns of a Parquet file, those that the file lacks with their value in `missing`."""
    with _file_errors(uri), storage.open(uri, version) as stream:
        file = pq.ParquetFile(stream, pre_buffer=False)
        stored = [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(_BATCH_ROWS, columns=stored, use_threads=False):
            arrays = [batch[x] if x in stored else pa.repeat(missing[x], len(batch)) for x in columns]
            yield pa.RecordBatch.from_arrays(arrays, [*columns])


def _decompressed(stream: Any) -> Any:
    compression = find_compression(stream.peek(10))
    return stream if compression is None else pa.PythonFile(DecompressedFile(stream, compression), "r")
