"""Reader of Parquet files with image bytes."""

import hashlib
import json
from collections.abc import Iterator
from itertools import count, islice
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.predictions import ErrorCategory, sample_error
from pipeline.read.limits import MAX_KEY_BYTES, Deadline
from pipeline.read.parquet_pages import PageCheckedFile
from pipeline.read.samples import ReadOptions, Sample, UnreadableShardError
from pipeline.read.shards import Shard
from pipeline.storage import Storage

_PARQUET_BUFFER_BYTES = 8 * 1024**2  # per column
_NO_IMAGE = sample_error(ErrorCategory.NO_IMAGE, "the row has no image bytes")


def read_parquet(
    storage: Storage, shard: Shard, options: ReadOptions, deadline: Deadline
) -> Iterator[Sample]:
    """Yields the samples of a Parquet file, one per row."""
    # Each column chunk has its own buffer over the unbuffered object: a common buffer would be discarded at
    # each change of column. `pre_buffer` would hold whole row groups.
    with (
        storage.open_unbuffered(shard.uri, shard.version) as stream,
        pq.ParquetFile(
            checked := PageCheckedFile(stream, deadline, options.max_page_bytes),
            buffer_size=_PARQUET_BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        ) as file,
    ):
        image_column = _image_column(file.schema_arrow, options)
        label_column = options.label_column if options.labels else None
        others = [name for name in (label_column, options.key_column) if name is not None]
        class_names = _class_names(file.schema_arrow, label_column)
        for name in others:
            _require_column(file.schema_arrow, name)
        columns = [image_column, *others]
        checked.has_footer = True

        def to_sample(row: int, batch: pa.RecordBatch) -> Sample:
            image, key_column = _image_and_path(batch.column(image_column))
            if options.key_column is not None:
                key_column = batch.column(options.key_column)
            value, problem = _value(key_column)
            key = f"{row:09d}" if value is None else str(value)
            error = _NO_IMAGE if image is None else options.size_error(image.size)
            if error is None and problem is not None:
                error = sample_error(ErrorCategory.INVALID_KEY, f"the value cannot be a key: {problem}")
            if image is None or error is not None:
                return Sample(key, None, error=error)
            label, problem = _value(None if label_column is None else batch.column(label_column))
            target, unmatched = options.parse_target(label, class_names)
            unmatched = unmatched if problem is None else f"the label cannot be read: {problem}"
            return Sample(key, image.to_pybytes(), target, unmatched=unmatched)

        # One row at a time, because many rows may refer to one large value in a page.
        yield from map(to_sample, count(), file.iter_batches(1, columns=columns, use_threads=False))


def _image_column(schema: pa.Schema, options: ReadOptions) -> str:
    """Returns the name of the image column: the configured column, or the only candidate."""
    name = options.image_column
    candidates = [
        column.name
        for column in schema
        # Without any image, the type of a column may be null.
        if _is_image_type(column.type, may_be_null=column.name in (name, "image"))
    ]
    if name is not None:
        _require_column(schema, name)
        if name not in candidates:
            problem = f"is {schema.field(name).type}, neither binary nor a struct with binary `bytes`"
            raise UnreadableShardError(f"column {name!r} {problem}; {_columns(schema)}")
        return name
    if "image" in candidates:
        return "image"
    if len(candidates) != 1:
        count = "no column" if not candidates else "more than one column"
        hint = f"{count} has an image type; set `input.image_column`"
        raise UnreadableShardError(f"{hint}; {_columns(schema)}")
    return cast(str, candidates[0])


def _class_names(schema: pa.Schema, column: str | None) -> list[str] | None:
    """Returns the class names of a column that is a ClassLabel in the metadata of Hugging Face `datasets`."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _require_column(schema: pa.Schema, name: str) -> None:
    if schema.names.count(name) != 1:
        raise UnreadableShardError(f"expected exactly one column {name!r}; {_columns(schema)}")


def _columns(schema: pa.Schema) -> str:
    shown = [f"{column.name} ({column.type})" for column in islice(schema, 20)]
    return "columns: " + ", ".join(shown) + (", ..." if len(schema) > 20 else "")


def _is_image_type(kind: pa.DataType, may_be_null: bool) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        kind = kind.field(index).type if index >= 0 else kind
    is_null = may_be_null and pa.types.is_null(kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or is_null)


def _image_and_path(column: pa.Array) -> tuple[pa.Buffer | None, pa.Array | None]:
    """Returns the bytes of the only image, without a copy, and the column with its path."""
    path = None
    if pa.types.is_struct(column.type):
        path = pc.struct_field(column, "path") if column.type.get_field_index("path") >= 0 else None
        column = pc.struct_field(column, "bytes")
    return column[0].as_buffer() if column[0].is_valid else None, path


def _value(column: pa.Array | None) -> tuple[object, str | None]:
    """Returns the only value of a column, with bytes as text, and why it cannot be read.

    Of text that is too long for a key, which no label is either, the value is the start and a hash.
    """
    try:
        scalar = None if column is None else column[0]
        if isinstance(scalar, pa.DictionaryScalar):
            scalar = scalar.value
        if scalar is None or not scalar.is_valid:
            return None, None
        if pa.types.is_nested(scalar.type):
            return None, f"the type is {scalar.type}"
        if not isinstance(scalar, pa.BinaryScalar):
            return scalar.as_py(), None
        buffer = scalar.as_buffer()
        text = buffer[:MAX_KEY_BYTES].to_pybytes().decode(errors="backslashreplace")
        if buffer.size > MAX_KEY_BYTES:
            text += hashlib.blake2b(buffer, digest_size=16).hexdigest()
        return text, None
    except Exception as error:  # whatever the value is, it affects only its row
        return None, str(error)
