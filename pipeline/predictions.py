"""The prediction file of a shard: its name, its columns, its Parquet bytes, and its footer.

Programs that know nothing of this project read these files, and everything else can be rebuilt from them.
They hold nothing about a run or a time: the same shard, labeled with the same fingerprint on the same kind
of device, gives the same bytes.
"""

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, NewType

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import Storage, StorageError

# Glob patterns, Hive partitions (`key=value` folders become columns), URI syntax, other systems' paths.
_UNSAFE = re.compile(r"""[%*?\[\]{}\\:=#"<>|\x00-\x1f\x7f]""")

# Hidden to Spark, DuckDB and others; `.` and `..` among them. A slash at either end or after another
# would make an empty part.
_UNSAFE_PLACES = re.compile(r"(?:^|(?<=/))[._/]|/$")

#: Maximum bytes of a part of a path, on every usual disk; and of a whole path: of the 1,024 bytes of an
#: object's key, 224 are left for the output URI.
MAX_PART_BYTES = 255
MAX_PATH_BYTES = 800

# An escape that a cut has gone through.
_BROKEN_ESCAPE = re.compile(r"%[0-9A-F]?$")

#: Rows of a row group: enough to compress well, few enough for a reader to skip some.
ROW_GROUP_ROWS = 65_536

_FOOTER = "cvt_label."


def prediction_path(shard_uri: str) -> str:
    """Returns the path of a shard's prediction file, relative to the folder of predictions.

    `s3://b/train/0000.tar` becomes `s3/b/train/0000.tar.parquet`, and `/data/x.tar`
    `file/data/x.tar.parquet`. What could leave the folder, be hidden, or mean something to a glob or to
    a reader of partitions is percent-encoded, and so is `%`: the path decodes to the normalized URI.

    A path with a part of more than 255 bytes, or more than 800 bytes in all, is cut, and ends in `%7E` (a
    tilde) and 160 bits of a hash of the URI. No other path has this escape, since a tilde is not encoded:
    two URIs never share a path.
    """
    scheme, separator, rest = shard_uri.partition("://")
    path = f"{scheme}/{rest}" if separator else f"file{shard_uri}"
    path = _UNSAFE_PLACES.sub(_encoded, _UNSAFE.sub(_encoded, path))
    whole = f"{path}.parquet"
    return whole if is_allowed_path(whole) else _shortened(path, shard_uri)


def is_allowed_path(path: str) -> bool:
    """Whether a path is within the limits of `prediction_path`."""
    data = path.encode()
    return len(data) <= MAX_PATH_BYTES and all(len(part) <= MAX_PART_BYTES for part in data.split(b"/"))


def _shortened(path: str, uri: str) -> str:
    end = f"%7E{hashlib.blake2b(uri.encode(), digest_size=20).hexdigest()}.parquet"
    parts = path.encode()[: MAX_PATH_BYTES - len(end)].split(b"/")
    too_long = (i for i, part in enumerate(parts) if len(part) > MAX_PART_BYTES)
    last = next(too_long, len(parts) - 1)
    kept = b"/".join([*parts[:last], parts[last][: MAX_PART_BYTES - len(end)]])
    # A character that the cut has gone through is left out.
    return _BROKEN_ESCAPE.sub("", kept.decode(errors="ignore")) + end


def _encoded(found: re.Match[str]) -> str:
    return f"%{ord(found.group()):02X}"  # all are ASCII


def prediction_schema(embedding: str = "none", embedding_width: int = 0) -> pa.Schema:
    """The columns of a prediction file, one row a sample; arguments as in `PredictionOptions`."""
    model = model_output_fields(embedding, embedding_width)
    return pa.schema(
        [
            pa.field("shard", pa.string(), nullable=False),
            pa.field("key", pa.string(), nullable=False),
            pa.field("index", pa.int64(), nullable=False),
            *model[:6],
            ("target_id", pa.int32()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("error", pa.string()),
            *model[6:],
        ]
    )


def model_output_fields(embedding: str = "none", embedding_width: int = 0) -> list[pa.Field]:
    """The columns that come from the model; all null in a row with an error."""
    fields = [
        pa.field("label", pa.string()),
        pa.field("label_id", pa.int32()),
        pa.field("score", pa.float32()),
        pa.field("topk_label_ids", pa.list_(pa.int32())),
        pa.field("topk_scores", pa.list_(pa.float32())),
        pa.field("entropy", pa.float32()),
    ]
    if embedding != "none":
        kind = pa.list_(pa.type_for_alias(embedding), embedding_width)
        fields.append(pa.field("embedding", kind))
    return fields


class ErrorCategory(StrEnum):
    """The categories of sample errors: the text of the column `error` before its first colon.

    The categories are part of the output contract. A category has no colon and no digit, and its text never
    changes, so that `split_part(error, ':', 1)` groups errors in SQL.
    """

    NO_IMAGE = "no image"  # no member with an image extension, or null in the image column
    IMAGE_NOT_FOUND = "image not found"  # an image file was deleted after the listing
    IMAGE_CHANGED = "image changed"  # an image file was replaced after the listing
    UNREADABLE_IMAGE = "unreadable image"  # a link or a special file in a tar
    EMPTY_IMAGE = "empty image"  # zero bytes
    FILE_TOO_LARGE = "file too large"  # more bytes than `input.max_image_bytes`
    DIMENSIONS_TOO_LARGE = "dimensions too large"  # more pixels than `input.max_image_pixels`
    UNSUPPORTED_FORMAT = "unsupported format"  # the first bytes are not of a supported image format
    CANNOT_DECODE = "cannot decode"  # a corrupt or truncated image
    UNREADABLE_LABEL = "unreadable label"  # a label file that is not text or not valid JSON
    INVALID_LABEL = "invalid label"  # the label is not a class of the model
    MODEL_FAILED = "model failed"  # the model raised an error for the image
    NON_FINITE_OUTPUT = "non-finite output"  # the model returned NaN or infinity


#: A text `<category>: <detail>` for the column `error`. Only `sample_error` creates one.
SampleError = NewType("SampleError", str)


def sample_error(category: ErrorCategory, detail: str) -> SampleError:
    """Returns the text of a sample's error: `<category>: <detail>`."""
    return SampleError(f"{category}: {detail}")


@dataclass(frozen=True)
class Footer:
    """What a prediction file's footer records about it.

    Attributes:
        shard: the shard's URI.
        version, format, size: of the shard, as it was listed and labeled.
        rows, errors: samples, and those that could not be classified.
        duplicate_keys: samples whose key an earlier sample of the shard has.
        statistics: the shard's partial class statistics, as `serialize_statistics` makes them.
    """

    shard: str
    version: str
    format: str
    size: int
    fingerprint: str
    rows: int
    errors: int
    duplicate_keys: int
    statistics: bytes


#: Fields that are text or numbers, in the order of the footer.
_FOOTER_FIELDS: list[Any] = [field for field in fields(Footer) if field.type in (str, int)]


def encode_predictions(predictions: pa.Table, footer: Footer) -> bytes:
    """Returns the Parquet file of one shard."""
    metadata = {field.name: str(getattr(footer, field.name)) for field in _FOOTER_FIELDS}
    # Base64, since the Parquet format wants text here and some readers insist on it.
    metadata["statistics"] = base64.b64encode(footer.statistics).decode()
    out = io.BytesIO()
    with pq.ParquetWriter(
        out,
        predictions.schema,
        compression="zstd",
        # Keys are unique and scores nearly so: a dictionary would only cost them space.
        use_dictionary=["shard", "label", "error"],
        # Minimum and maximum also of each page (20,000 rows): half a percent, and readers skip more.
        write_page_index=True,
    ) as writer:
        writer.write_table(predictions, row_group_size=ROW_GROUP_ROWS)
        # Not as the schema's metadata, which Arrow writes a second time.
        writer.add_key_value_metadata({_FOOTER + name: value for name, value in metadata.items()})
    return out.getvalue()


def read_footer(uri: str, file: io.IOBase) -> Footer:
    """Reads a prediction file's footer, and no rows; raises `StorageError` if it is no prediction file."""
    try:
        found = pq.read_metadata(file).metadata or {}
        metadata = {name.decode(): text.decode() for name, text in found.items()}
        values = {field.name: field.type(metadata[_FOOTER + field.name]) for field in _FOOTER_FIELDS}
        statistics = base64.b64decode(metadata[f"{_FOOTER}statistics"])
        return Footer(**values, statistics=statistics)
    except KeyError as missing:
        raise StorageError(uri, f"not a prediction file: its footer has no {missing}") from None
    except (pa.ArrowInvalid, ValueError) as error:
        raise StorageError(uri, f"not a prediction file: {error}") from None


def read_predictions(storage: Storage, uri: str, columns: Sequence[str]) -> tuple[Footer, pa.Table] | None:
    """Reads the footer and some columns of a prediction file's current version.

    A copy of a partition has other versions than the manifest that was copied with it, so none is asked for.
    Returns None if there is no such file; raises `StorageError` if it can't be read, or is something else.
    """

    def read(file: io.BufferedReader) -> tuple[Footer, pa.Table]:
        footer = read_footer(uri, file)
        try:
            return footer, pq.read_table(file, columns=list(columns)).select(columns)
        except (pa.ArrowInvalid, KeyError) as error:
            raise StorageError(uri, f"not a prediction file: {error}") from None

    found = storage.read_latest(uri, read)
    return None if found is None else found.content


def serialize_statistics(partial: pa.Table) -> bytes:
    """Returns partial statistics as the bytes of an Arrow stream."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, partial.schema, options=options) as writer:
        writer.write_table(partial.combine_chunks())
    return bytes(sink.getvalue())


def deserialize_statistics(data: bytes) -> pa.Table:
    """Reads the partial statistics that `serialize_statistics` wrote."""
    return pa.ipc.open_stream(data).read_all()


@dataclass(frozen=True)
class PredictionOptions:
    """What is kept of the model's outputs.

    Attributes:
        labels: the classes' names, by class id.
        topk: best classes kept of each image; no more than there are classes.
        embedding: "none", "float16" or "float32".
        embedding_width: values in an embedding.
    """

    labels: Sequence[str]
    topk: int
    embedding: str
    embedding_width: int
