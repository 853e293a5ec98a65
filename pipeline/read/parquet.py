"""Reader of Parquet files with image bytes."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.predictions import ErrorCategory, sample_error
from pipeline.read.samples import ReadOptions, Sample, UnreadableShardError
from pipeline.read.shards import Shard
from pipeline.storage import Storage

_PARQUET_BATCH_ROWS = 16
_PARQUET_BUFFER_BYTES = 8 * 1024**2  # per column
_NO_IMAGE = sample_error(ErrorCategory.NO_IMAGE, "the row has no image bytes")


def read_parquet(storage: Storage, shard: Shard, options: ReadOptions) -> Iterator[Sample]:
    """Yields the samples of a Parquet file, one per row."""
    # Each column chunk has its own buffer over the unbuffered object: a common buffer would be discarded at
    # each change of column. `pre_buffer` would hold whole row groups.
    with (
        storage.open_unbuffered(shard.uri, shard.version) as stream,
        pq.ParquetFile(
            stream, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        ) as file,
    ):
        image_column = _image_column(file.schema_arrow, options)
        label_column = options.label_column if options.labels else None
        others = [name for name in (label_column, options.key_column) if name is not None]
        class_names = _class_names(file.schema_arrow, label_column)
        for name in others:
            _require_column(file.schema_arrow, name)
        row = 0
        for batch in file.iter_batches(
            _PARQUET_BATCH_ROWS, columns=[image_column, *others], use_threads=False
        ):
            nulls = pa.nulls(batch.num_rows)
            images, paths = _image_values(batch.column(image_column), nulls)
            labels = batch.column(label_column) if label_column is not None else nulls
            keys = batch.column(options.key_column) if options.key_column is not None else paths
            sizes = pc.binary_length(images)
            for i in range(batch.num_rows):
                size = sizes[i].as_py()
                key = _key(keys[i].as_py(), row)
                error = _NO_IMAGE if size is None else options.size_error(size)
                if error is None:
                    target, unmatched = options.parse_target(labels[i].as_py(), class_names)
                    yield Sample(key, images[i].as_py(), target, unmatched=unmatched)
                else:
                    yield Sample(key, None, error=error)
                row += 1


def _image_column(schema: pa.Schema, options: ReadOptions) -> str:
    """Returns the name of the image column: the configured column, or the only candidate."""
    candidates = [column.name for column in schema if _is_image_type(column.type)]
    name = options.image_column
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


def _is_image_type(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        kind = kind.field(index).type if index >= 0 else kind
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image_values(column: pa.Array, nulls: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Returns the bytes and the paths of the images; the paths are `nulls` if the column has no paths."""
    if not pa.types.is_struct(column.type):
        return column, nulls
    has_path = column.type.get_field_index("path") >= 0
    return pc.struct_field(column, "bytes"), pc.struct_field(column, "path") if has_path else nulls


def _key(value: object, row: int) -> str:
    """Returns a sample's key: the value of the key column or the path, or else the row number."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return f"{row:09d}" if value is None else str(value)
