"""Tables of image URIs: their rows, in shards of 1,000 rows.

The rows of a shard travel in `Shard.rows`, as a serialized table. Its columns are `uri` (null if the row has
no valid URI), `error` (then the error of the row), `version` (null if unknown), `key`, `label` if there is a
label column, and a struct `carried` with the columns of `input.carry`. The metadata of the schema has the
dataset's own class names. `pipeline.read.downloads` reads the images.
"""

import hashlib
import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from os.path import commonprefix
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import ConfigError, InputConfig
from pipeline.predictions import ErrorCategory, deserialize_table, sample_error, serialize_table
from pipeline.read.parquet import describe_columns, read_class_names, read_value
from pipeline.read.samples import Sample
from pipeline.read.shards import IMAGE_EXTENSIONS, IgnoreReason, Shard, file_extension, table_suffix
from pipeline.read.snapshots import DataFile, open_snapshot
from pipeline.read.table_files import SPELLINGS, VERSION, normalize_location, open_file, open_inventory
from pipeline.storage import (
    ABSENT,
    AccessDenied,
    BucketNotFound,
    ObjectInfo,
    Storage,
    StorageError,
    is_relative,
    is_under,
    map_in_threads,
    normalize_uri,
)
from pipeline.text import remove_secrets

_SHARD_ROWS = 1000
_WINDOW_SHARDS = 500  # whose objects are looked up together
_LISTED, _LISTED_PER_ROW = 1000, 10  # objects of a folder that are listed at most: this and more per row
#: For the progress of a run: the assumed size of an image of unknown size.
_UNKNOWN_BYTES = 100_000
#: Usual names of the column with the URIs, in lower case.
_URI_NAMES = {
    "uri", "url", "image_uri", "image_url", "img_url", "image_path", "path", "file_path", "filepath",
    "file_name", "filename", "image_file", "s3_uri", "s3_path", "gcs_uri",
}  # fmt: skip
_BUCKET, _MAX_KEY_BYTES = re.compile(r"[A-Za-z0-9._-]{1,255}"), 1024
_SCHEMES = {*SPELLINGS, "s3", "gs", "http", "https", "file"}
_FILTERED, _CLASS_NAMES = "cvt_label_filtered", b"class_names"
_ROW_SCHEMA = pa.schema({"uri": pa.string(), "error": pa.string(), "key": pa.string()})


def select_rows(shard: Shard, indices: Sequence[int]) -> Shard:
    """Returns the shard of a table with only the rows at these indices, with the same URI and version."""
    rows = deserialize_table(shard.rows).take(pa.array(indices, pa.int64()))
    return replace(shard, rows=serialize_table(rows), row_count=len(rows))


def row_samples(shard: Shard) -> list[Sample]:
    """Returns the samples of a shard of a table, in order, without images and targets."""
    rows = deserialize_table(shard.rows)
    class_names = json.loads((rows.schema.metadata or {}).get(_CLASS_NAMES, b"null"))
    labels = rows["label"].combine_chunks() if "label" in rows.column_names else None
    carried = rows["carried"].combine_chunks().flatten() if "carried" in rows.column_names else []
    columns = (rows[name].to_pylist() for name in ("key", "error", "uri", "version"))
    samples = []
    for row, (key, error, uri, version) in enumerate(zip(*columns, strict=True)):
        sample = Sample(key, None, error=error, uri=uri, version=version, label_names=class_names)
        sample.carried = tuple(column[row] for column in carried)
        if labels is not None and error is None:
            sample.label, sample.unmatched = read_value(labels[row], "label")
        samples.append(sample)
    return samples


def list_tables(
    storage: Storage,
    section: InputConfig,
    files: Iterator[Shard],
    ignore: Callable[[str, IgnoreReason], None],
) -> Iterator[Shard]:
    """Yields the shards of the tables of an input.

    The folder of a Delta or Iceberg table is a file without a version. `ignore` is called with the objects of
    an inventory that are no images, and why.

    Raises:
        StorageError: A file cannot be read, or the objects of the images cannot be listed.
        ConfigError: A column is missing, or a condition of `input.filter` does not fit its column.
    """

    def ranges() -> Iterator[tuple[DataFile, int, pa.Table]]:
        for file in _find_tables(section, files, ignore):
            if file.uri.endswith("/manifest.json"):
                opened: Iterable[DataFile] = open_inventory(storage, file.uri, ignore)
            elif not file.version or ".metadata.json" in file.uri:  # a Delta or Iceberg table
                opened = open_snapshot(storage, file.uri)
            else:
                opened = [open_file(storage, file.object, section.csv_columns)]
            for part in opened:
                yield from _ranges(section, part)

    found, size = ranges(), 1  # a check for any shard stops at the first one
    while window := list(islice(found, size)):
        columns = [rows["uri"].filter(pc.is_null(rows["version"])).drop_null() for *_, rows in window]
        unknown = {uri for column in columns for uri in column.to_pylist()}
        versions = find_versions(storage, unknown, section.check_objects)
        for file, start, rows in window:
            yield _to_shard(file, start, rows, versions)
        size = _WINDOW_SHARDS


def _find_tables(
    section: InputConfig, files: Iterator[Shard], ignore: Callable[[str, IgnoreReason], None]
) -> Iterator[Shard]:
    """Yields the files of tables.

    JSON and text next to other tables only describe them, such as `dataset_info.json` and `LICENSE.txt`.
    """
    names = {name for pattern in section.inputs.patterns for name in pattern.names}
    for _, group in groupby(files, lambda file: section.inputs.root_of(file.uri)):
        notes, has_others = list[Shard](), False
        for file in group:
            is_metadata = file.uri.endswith("/manifest.json") or ".metadata.json" in file.uri
            if is_metadata and file.uri not in names:
                cause = f"{file.uri} looks like metadata of an Iceberg table or of an S3 Inventory"
                raise ConfigError(f"input.uri: {cause}: set input.uri to it, or exclude it (input.exclude)")
            is_note = table_suffix(file.uri) in (".json", ".txt")
            has_others = has_others or not is_note
            if is_note and file.uri not in names:
                notes.append(file)
            else:
                yield file
        if has_others:
            for file in notes:
                ignore(file.uri, IgnoreReason.FORMAT)
        else:
            yield from notes


def _to_shard(file: DataFile, start: int, rows: pa.Table, versions: Mapping[str, str]) -> Shard:
    pairs = zip(rows["uri"].to_pylist(), rows["version"].to_pylist(), strict=True)
    found = [version or versions.get(name) for name, version in pairs]
    rows = rows.set_column(rows.schema.get_field_index("version"), "version", pa.array(found, pa.string()))
    digest = hashlib.blake2b(repr(rows.schema.metadata).encode(), digest_size=16)
    for column in rows.flatten().columns:
        if pa.types.is_temporal(column.type):  # Python has no nanoseconds, and not every time zone and date
            column = column.cast(pa.int32() if column.type.bit_width == 32 else pa.int64())
        digest.update(repr(column.to_pylist()).encode())
    sizes = [int(version.rpartition("-")[2]) for version in found if version not in (None, ABSENT)]
    part, folder = file.uri, file.table or file.uri
    if not is_under(part, folder):  # a plan finds the labels of a rewritten file by the folder of the table
        name = hashlib.blake2b(part.encode(), digest_size=8).hexdigest()
        part = f"{folder}/{name}-{part.rpartition('/')[2]}"
    return Shard(
        f"{part}/rows-{start:012d}",
        digest.hexdigest(),
        "table",
        sum(sizes) + _UNKNOWN_BYTES * (len(rows) - len(sizes)),
        rows=serialize_table(rows),
        row_count=len(rows),
        file=ObjectInfo(folder, 0, ""),
    )


def _ranges(section: InputConfig, file: DataFile) -> Iterator[tuple[DataFile, int, pa.Table]]:
    """Yields the file, the start and the rows of each range with rows that `input.filter` selects."""
    if not file.schema.names:  # an empty file
        return
    roles = {"uri": _find_uri_column(section, file), "key": section.key_column}
    roles["label"] = section.label_column if section.labels and section.label_from is None else None
    for role, name in roles.items():
        _require_column(file, name, f"{role}_column")
    for name, *_ in section.filter:
        _require_column(file, name, "filter")
    carried = [name for name in section.carry if name in file.schema.names]
    filtered = [name for name, *_ in section.filter]
    needed = list(dict.fromkeys([*filter(None, roles.values()), *carried, *filtered]))
    metadata = {_CLASS_NAMES: json.dumps(read_class_names(file.schema, section.label_column))}
    start = 0
    for table in _rechunk(file.read(needed)):
        selected = _select(section, file, pa.table({x: _decoded(table[x]) for x in table.column_names}))
        if len(selected):
            yield file, start, _to_rows(section, file, roles, selected).replace_schema_metadata(metadata)
        start += len(table)


def _to_rows(
    section: InputConfig, file: DataFile, roles: Mapping[str, str | None], table: pa.Table
) -> pa.Table:
    """Returns the rows of a shard from the columns of a table."""
    missing = pa.nulls(len(table), pa.string())
    keys = table[roles["key"]].combine_chunks() if roles["key"] else missing
    found = []
    for row, value in enumerate(table[roles["uri"]].to_pylist()):
        if isinstance(value, dict):  # the Image type of `datasets`
            if value.get("bytes") is not None:
                raise ConfigError(f"input.format: {file.uri} has the bytes of images; set parquet, not table")
            value = value.get("path")
        text = value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value or "")
        text = text.strip()
        key, problem = read_value(keys[row], "key")
        uri = error = None
        if not text:
            error = sample_error(ErrorCategory.NO_IMAGE, "the row has no URI")
        elif problem is not None:
            error = sample_error(ErrorCategory.INVALID_KEY, problem)
        else:
            try:
                uri = resolve_uri(text, file.folder)
            except (ValueError, StorageError) as invalid:
                cause = invalid.cause if isinstance(invalid, StorageError) else str(invalid)
                error = sample_error(ErrorCategory.INVALID_URI, f"{text[:200]!r}: {cause}")
        key = remove_secrets(text) if key is None else str(key)
        found.append({"uri": uri, "error": error, "key": key or f"{row:09d}"})
    rows = pa.Table.from_pylist(found, _ROW_SCHEMA)
    rows = rows.append_column("version", table[VERSION] if VERSION in table.column_names else [missing])
    if roles["label"]:
        rows = rows.append_column("label", table[roles["label"]])
    if section.carry:
        values = [table[x].combine_chunks() if x in table.column_names else missing for x in section.carry]
        rows = rows.append_column("carried", [pa.StructArray.from_arrays(values, [*section.carry])])
    return rows


def resolve_uri(text: str, folder: str) -> str:
    """Returns the normalized URI of an image; raises `ValueError` or `StorageError` for another text."""
    text.encode()
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    is_path = not separator and (is_relative(text) or text.startswith(("/", "file:/")))
    if re.search(r"[\0-\x1f\x7f]|^data:", text) or not (is_path or scheme in _SCHEMES):
        raise ValueError("not the URI of an image; s3://, gs://, http(s)://, file:// and paths are supported")
    if separator and scheme in ("http", "https"):
        address = urlsplit(text)
        if not address.hostname or "@" in address.netloc:
            raise ValueError("the URI has no host, or contains credentials")
        _ = address.port  # raises
        return f"{scheme}://{rest}"
    if separator or not is_relative(text):
        uri = normalize_location(text)
        bucket, _, key = uri.partition("://")[2].partition("/")
        if "://" in uri and not (_BUCKET.fullmatch(bucket) and 0 < len(key.encode()) <= _MAX_KEY_BYTES):
            raise ValueError("the URI has no valid bucket and key")
        return uri
    scheme, separator, place = folder.partition("://")
    if not separator:
        return normalize_uri(f"{folder}/{text}")
    name = posixpath.normpath(f"{place}/{text}")
    if not name.startswith(f"{place.partition('/')[0]}/"):
        raise ValueError(f"the path is outside of the bucket of {folder}")
    return f"{scheme}://{name}"


def find_versions(storage: Storage, uris: Iterable[str], check: str) -> dict[str, str]:
    """Returns the versions of objects; `ABSENT` if an object does not exist; none if it is not known.

    Each folder is listed, from the common prefix of its objects. If it has many other objects, the listing
    stops, and the remaining objects are looked up one by one. Objects on web servers are looked up only if
    `check` is `always`, and nothing is looked up if it is `never`.
    """
    if check == "never":
        return {}
    folders, remote = defaultdict[str, set[str]](set), list[str]()
    for uri in uris:
        if uri.startswith(("http://", "https://")):
            remote.append(uri)
        else:
            folders[uri.rpartition("/")[0]].add(uri)

    def list_folder(folder: str) -> dict[str, str | None]:
        wanted = folders[folder]
        limit = _LISTED + _LISTED_PER_ROW * len(wanted)
        prefix = commonprefix([*wanted])[len(folder) + 1 :]  # noqa: RUF071
        listed = [*islice(storage.list(folder, prefix=prefix), limit)]
        versions: dict[str, str | None] = dict.fromkeys(wanted, ABSENT if len(listed) < limit else None)
        return versions | {info.uri: info.version for info in listed if info.uri in wanted}

    def ask(find: Callable[[str], Any], uri: str) -> Any:
        """Returns None for a failure that is about these images; reading reports it."""
        try:
            return find(uri)
        except StorageError as error:
            if "://" not in uri or isinstance(error, AccessDenied | BucketNotFound):
                return None
            remedy = "input.check_objects: never plans without looking up the images"
            raise StorageError(error.uri, f"{error.cause}; {remedy}") from error

    found = dict[str, str | None]()
    for listed in map_in_threads(partial(ask, list_folder), folders):
        found |= listed or {}
    others = [uri for uri, version in found.items() if version is None]
    found |= zip(others, map_in_threads(partial(ask, storage.version), others), strict=True)
    if check == "always" and remote:
        with storage.downloader() as downloader:
            for start in range(0, len(remote), _SHARD_ROWS):
                for uri, head in [(x, downloader.head(x)) for x in remote[start : start + _SHARD_ROWS]]:
                    with suppress(StorageError):  # reading reports it
                        found[uri] = head.result().version
    return {uri: version for uri, version in found.items() if version is not None}


def _find_uri_column(section: InputConfig, file: DataFile) -> str:
    if section.uri_column is not None:
        return section.uri_column
    names = [name for name in file.schema.names if name.lower() in _URI_NAMES] or file.schema.names
    if len(names) != 1 or _is_data(file, names):
        cause = f"set the column with the URIs of the images of {file.uri}"
        other = "exclude the file (input.exclude); for a column with image bytes, set input.format: parquet"
        raise ConfigError(f"input.uri_column: {cause}, or {other}; {_describe(file)}")
    return str(names[0])


def _describe(file: DataFile) -> str:
    remedy = "; the first line is not a header: set input.csv_columns to the names of the columns"
    return describe_columns(file.schema) + (remedy if _is_data(file, file.schema.names) else "")


def _is_data(file: DataFile, names: Iterable[str]) -> bool:
    """Returns whether a column of a CSV file has a path or an image as its name: the file has no header."""
    is_csv = table_suffix(file.uri) in (".csv", ".tsv")
    return is_csv and any("/" in name or file_extension(name)[1:] in IMAGE_EXTENSIONS for name in names)


def _require_column(file: DataFile, name: str | None, field: str) -> None:
    if name is not None and file.schema.names.count(name) != 1:
        found = file.schema.names.count(name)
        problem = f"{found} columns of {file.uri} are named" if found else f"{file.uri} has no column"
        raise ConfigError(f"input.{field}: {problem} {name!r}; {_describe(file)}")


def _rechunk(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yields tables of `_SHARD_ROWS` rows; the last one may have fewer."""
    rest: pa.Table | None = None
    for batch in batches:
        table = pa.table(batch)
        rest = table if rest is None else pa.concat_tables([rest, table], promote_options="permissive")
        while len(rest) >= _SHARD_ROWS:
            yield rest.slice(0, _SHARD_ROWS)
            rest = rest.slice(_SHARD_ROWS)
    if rest is not None and len(rest):
        yield rest


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns a column without dictionaries and views."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    kind = pa.string() if pa.types.is_string_view(kind) else kind
    return column.cast(pa.binary() if pa.types.is_binary_view(kind) else kind)


def _select(section: InputConfig, file: DataFile, table: pa.Table) -> pa.Table:
    """Returns the rows that meet the conditions of `input.filter`."""
    for name, operator, value in section.filter:
        column = table[name]
        try:
            values = pa.array(value if isinstance(value, list) else [value])
            kind = column.type
            is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
            if is_text:  # as in CSV
                column = column.cast(values.type)
            elif pa.types.is_decimal(kind):  # an integer would need 19 digits
                values = values.cast(pa.string())
            values = values.cast(column.type)
            condition = (_FILTERED, operator, values if isinstance(value, list) else values[0])
            selects = pq.filters_to_expression([condition])
            table = table.append_column(_FILTERED, column).filter(selects).drop_columns([_FILTERED])
        except (ValueError, TypeError, pa.ArrowException) as error:
            cause = f"[{name}, {operator}, {value!r}] does not fit the column {name!r} ({column.type})"
            raise ConfigError(f"input.filter: {cause} of {file.uri}: {error}") from None
    return table
