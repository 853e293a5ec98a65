"""Reader of Parquet files with image bytes."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.predictions import ErrorCategory, sample_error
from pipeline.read.limits import Deadline
from pipeline.read.parquet_pages import ColumnChunkFile, FooterFile
from pipeline.read.samples import (
    MAX_CARRIED_BYTES,
    MAX_KEY_BYTES,
    ReadOptions,
    Sample,
    UnreadableShardError,
)
from pipeline.read.shards import Shard
from pipeline.storage import Storage

_IMAGE_BUFFER_BYTES, _BUFFER_BYTES = 8 * 1024**2, 1024**2  # of the image column, and of each other column
# A small file may refer to a large value in each row, and reading each row copies the value.
_MAX_REJECTED_BYTES, _MAX_REJECTED_FACTOR = 512 * 1024**2, 10
_MAX_ID_BYTES = 64
#: The field of `input` with the limit or the column of a role.
_FIELDS = {"image": "max_image_bytes", "key": "key_column", "label": "label_column"}
_MISSING = pa.nulls(1)
_NO_IMAGE = sample_error(
    ErrorCategory.NO_IMAGE, "the row has no image bytes (input.format: table reads images by path or URI)"
)


def read_parquet(
    storage: Storage, shard: Shard, options: ReadOptions, deadline: Deadline
) -> Iterator[Sample]:
    """Yields the samples of a Parquet file, or of a range of its row groups, one per row."""
    with storage.open_unbuffered(shard.object.uri, shard.object.version) as stream:
        file = pq.ParquetFile(FooterFile(stream, deadline), pre_buffer=False)
        paths = _column_paths(file.schema_arrow, [column.path for column in file.schema], options)
        class_names = read_class_names(file.schema_arrow, options.input.label_column)
        rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        starts = [0, *accumulate(rows)]
        first, end = shard.span or (0, starts[-1])
        if not {first, end} <= {*starts}:
            raise UnreadableShardError("the row groups of the file have changed; run the same command again")
        options.check_count(end - first)
        groups = [i for i, count in enumerate(rows) if count and first <= starts[i] < end]

        def read(role: str) -> Iterator[pa.Array]:
            """Yields the values of a column one at a time: many rows may refer to one large value."""
            chunks = ColumnChunkFile(stream, deadline, options.read.max_page_bytes, paths[role])
            # A common buffer would be discarded at each change of column; `pre_buffer` holds row groups.
            column = pq.ParquetFile(
                chunks,
                metadata=file.metadata,
                buffer_size=_IMAGE_BUFFER_BYTES if role == "image" else _BUFFER_BYTES,
                pre_buffer=False,
                page_checksum_verification=True,
            )
            for group in groups:
                chunks.start_chunk()
                count = 0
                for batch in column.iter_batches(1, [group], [paths[role]], use_threads=False):
                    count += 1
                    yield batch.column(0)
                if count != rows[group]:
                    problem = f"{count:,} rows, but the footer of the file states {rows[group]:,}"
                    column_name = f"column {paths[role]!r} of row group {group}"
                    raise UnreadableShardError(f"{column_name} has {problem}: write the file again")

        rejected, max_rejected = 0, _MAX_REJECTED_BYTES + _MAX_REJECTED_FACTOR * shard.size
        for row, values in enumerate(zip(*map(read, paths), strict=True), first):
            columns = dict(zip(paths, values, strict=True))
            for role, column in columns.items():
                limit = options.input.max_image_bytes if role == "image" else MAX_CARRIED_BYTES
                rejected += column.nbytes if column.nbytes > limit else 0
                if rejected > max_rejected:
                    raise UnreadableShardError(
                        f"column {paths[role]!r} has too many long values: the values over the limit of "
                        f"a value have more than {max_rejected:,} bytes; write shorter values, or change "
                        f"input.{_FIELDS.get(role, 'carry')}"
                    )
            yield _to_sample(row, columns, class_names, options)


def _to_sample(
    row: int, columns: Mapping[str, pa.Array], class_names: list[str] | None, options: ReadOptions
) -> Sample:
    """Returns the sample of a row. Columns have the value of the row, by role."""
    image = columns["image"][0]
    image = image["bytes"] if isinstance(image, pa.StructScalar) and image.is_valid else image
    key_column = columns.get("key", _MISSING)
    if options.input.key_column is None and "key" in columns:
        key_column = pc.struct_field(key_column, "path")
    key, problem = read_value(key_column[0], "key")
    sample = Sample(f"{row:09d}" if key is None else str(key), None, label_names=class_names)
    sample.carried = tuple(columns.get(f"carry {name}", _MISSING)[0] for name in options.input.carry)
    sample.error = options.size_error(image.as_buffer().size) if image.is_valid else _NO_IMAGE
    if sample.error is None and problem is not None:
        sample.error = sample_error(ErrorCategory.INVALID_KEY, problem)
    if sample.error is None:
        sample.image = image.as_buffer().to_pybytes()
        sample.label, sample.unmatched = read_value(columns.get("label", _MISSING)[0], "label")
    return sample


def _column_paths(schema: pa.Schema, paths: Sequence[str], options: ReadOptions) -> dict[str, str]:
    """Returns the paths of the columns to read, by role: image, key, label, and `carry <name>`."""
    image = _image_column(schema, options)
    is_struct = pa.types.is_struct(schema.field(image).type)
    found = {"image": f"{image}.bytes", "key": f"{image}.path"} if is_struct else {"image": image}
    has_label = options.input.labels and options.input.label_from is None
    columns = {"key": options.input.key_column, "label": options.input.label_column if has_label else None}
    for role, name in columns.items():
        if name is not None:
            _require_column(schema, name, role)
    columns |= {f"carry {name}": name for name in options.input.carry if name in schema.names}
    for role, name in columns.items():
        if name is not None:
            leaves = [path for path in paths if f"{path}.".startswith(f"{name}.")]
            if role.startswith("carry ") and len(leaves) > 1:
                problem = f"column {name!r} has several parts: {leaves}"
                raise UnreadableShardError(f"input.carry: {problem}; remove it, or write it as JSON text")
            # The first part of a nested column is enough to report that it is nested.
            found[role] = min(leaves, key=len)
    found = {role: path for role, path in found.items() if path in paths}
    for path in found.values():
        if sum(f"{x}.".startswith(f"{path}.") for x in paths) > 1:  # pyarrow would read all of them
            raise UnreadableShardError(f"several columns are named {path!r} or '{path}.*'; rename one")
    return found


def _image_column(schema: pa.Schema, options: ReadOptions) -> str:
    """Returns the name of the image column: the configured column, or the only candidate."""
    name = options.input.image_column
    if name is None:
        candidates = [field.name for field in schema if _is_image_type(field.type, field.name == "image")]
        if "image" not in candidates and len(candidates) != 1:
            found = "more than one column has an image type"
            if not candidates:
                found = "no column has an image type: for images by URI or path, set input.format: table; "
                found += "for decoded pixels, encode them as JPEG or PNG"
            cause = f"{found}; for another column, set input.image_column"
            raise UnreadableShardError(f"{cause}; {describe_columns(schema)}")
        name = "image" if "image" in candidates else cast(str, candidates[0])
    _require_column(schema, name, "image")
    kind = schema.field(name).type
    if not _is_image_type(kind, may_be_null=True):
        problem = f"column {name!r} is {kind}, neither binary nor a struct with binary `bytes`"
        raise UnreadableShardError(f"{problem}; {describe_columns(schema)}")
    return name


def read_class_names(schema: pa.Schema, column: str | None) -> list[str] | None:
    """Returns the class names of a column that is a ClassLabel in the metadata of Hugging Face `datasets`."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _require_column(schema: pa.Schema, name: str, role: str) -> None:
    if (found := schema.names.count(name)) != 1:
        problem = f"{found} columns are named {name!r}; rename one, or" if found else f"no column {name!r};"
        folder = " (in the name of a folder: input.label_from: folder)" if role == "label" else ""
        raise UnreadableShardError(f"{problem} set input.{role}_column{folder}; {describe_columns(schema)}")


def describe_columns(schema: pa.Schema) -> str:
    """Returns the names and types of the columns, for messages."""
    shown = [f"{column.name} ({column.type})" for column in islice(schema, 20)]
    return "columns: " + ", ".join(shown) + (", ..." if len(schema) > 20 else "")


def _is_image_type(kind: pa.DataType, may_be_null: bool) -> bool:
    # The type is null if there is no image.
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        kind = kind.field(index).type if index >= 0 else kind
    is_null = may_be_null and pa.types.is_null(kind)
    is_fixed = pa.types.is_fixed_size_binary(kind) and not pa.types.is_decimal(kind)
    # 16 bytes are a UUID, and 32 a hash: no image is as small.
    is_fixed = is_fixed and (may_be_null or kind.byte_width > _MAX_ID_BYTES)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or is_fixed or is_null)


def read_value(scalar: pa.Scalar, role: str) -> tuple[object, str | None]:
    """Returns a value, with bytes as text, and the error of a key or label that cannot be read.

    Of text that is too long for a key, which no label is either, the value is the start and a hash.
    """
    try:
        if not scalar.is_valid:
            return None, None
        if pa.types.is_nested(scalar.type):
            raise TypeError(f"the type is {scalar.type}")
        if not isinstance(scalar, pa.BinaryScalar):
            return scalar.as_py(), None
        buffer = scalar.as_buffer()
        text = buffer[:MAX_KEY_BYTES].to_pybytes().decode(errors="backslashreplace")
        if buffer.size > MAX_KEY_BYTES:
            text += hashlib.blake2b(buffer, digest_size=16).hexdigest()
        return text, None
    except Exception as error:  # whatever the value is, it affects only its row
        return None, f"the {role} cannot be read: {error}"
