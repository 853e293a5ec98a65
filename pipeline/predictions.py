"""The output contract: name, columns and footer of a shard's prediction file; columns of consumer tables.

A prediction file has no information about a run or a time: repeated labeling writes the same bytes.
"""

import base64
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, NewType

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import Storage, StorageError, content_errors, objects, read_table
from pipeline.text import remove_secrets

# Characters with a meaning in glob patterns, Hive partitions (`key=value`), URIs, or paths of other systems.
_UNSAFE = re.compile(r"""[%*?\[\]{}\\:=#"<>|\x00-\x1f\x7f]""")

# A leading `.` or `_` hides a file from Spark and others. Other slashes would create an empty part.
# A folder with the parts of `x.parquet` must not match `*.parquet`: some readers would read the parts twice.
_UNSAFE_POSITIONS = re.compile(r"(?:^|(?<=/))[._/]|/$|\.(?=parquet/rows-\d{12}$)")

#: Maximum bytes of a part of a path, as in common file systems, and of a path: 224 bytes of a key remain.
MAX_PART_BYTES = 255
MAX_PATH_BYTES = 800

_BROKEN_ESCAPE = re.compile(r"%[0-9A-F]?$")

#: Rows per row group: enough for good compression, and few enough for readers to skip row groups.
ROW_GROUP_ROWS = 65_536

_FOOTER = "cvt_label."


def prediction_path(shard_uri: str) -> str:
    """Returns the path of a shard's prediction file, relative to the folder of predictions.

    `s3://b/train/0000.tar` becomes `s3/b/train/0000.tar.parquet`, and `/data/x.tar` becomes
    `file/data/x.tar.parquet`. Characters are percent-encoded if they could leave the folder, hide the file,
    or have a meaning for globs or Hive partitions. `%` is encoded too: the path decodes to the URI.

    A path over the limits is truncated, and ends in `%7E` and 160 bits of a hash of the URI. No other path
    has this escape, because a tilde is not encoded. Two URIs therefore never share a path.
    """
    scheme, separator, rest = shard_uri.partition("://")
    path = f"{scheme}/{rest}" if separator else f"file{shard_uri}"
    path = _UNSAFE_POSITIONS.sub(_percent_encode, _UNSAFE.sub(_percent_encode, path))
    full_path = f"{path}.parquet"
    return full_path if is_allowed_path(full_path) else _truncate_path(path, shard_uri)


def is_allowed_path(path: str) -> bool:
    """Returns whether a path is within the limits of `prediction_path`."""
    data = path.encode()
    return len(data) <= MAX_PATH_BYTES and all(len(part) <= MAX_PART_BYTES for part in data.split(b"/"))


def _truncate_path(path: str, uri: str) -> str:
    suffix = f"%7E{hashlib.blake2b(uri.encode(), digest_size=20).hexdigest()}.parquet"
    parts = path.encode()[: MAX_PATH_BYTES - len(suffix)].split(b"/")
    too_long = (i for i, part in enumerate(parts) if len(part) > MAX_PART_BYTES)
    last = next(too_long, len(parts) - 1)
    kept = b"/".join([*parts[:last], parts[last][: MAX_PART_BYTES - len(suffix)]])
    # A partial character at the end is dropped.
    return _BROKEN_ESCAPE.sub("", kept.decode(errors="ignore")) + suffix


def _percent_encode(match: re.Match[str]) -> str:
    return f"%{ord(match.group()):02X}"  # all unsafe characters are ASCII


def prediction_schema(
    embedding: str = "none", embedding_width: int = 0, label_names: bool = False
) -> pa.Schema:
    """Returns the columns of a prediction file, one row per sample; arguments as in `PredictionOptions`.

    Columns that `input.carry` names follow these columns, see `carried_column`.
    """
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
            ("uri", pa.string()),
            ("version", pa.string()),
            ("offset", pa.int64()),
            ("size", pa.int64()),
            *([("target", pa.string()), ("topk_labels", pa.list_(pa.string()))] if label_names else []),
            *model[6:],
        ]
    )


def model_output_fields(embedding: str = "none", embedding_width: int = 0) -> list[pa.Field]:
    """Returns the columns with outputs of the model. All are null in a row with an error."""
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


#: The columns of a consumer table: those of prediction files, and where each row comes from. `source` is the
#: URI of the partition, `output_version` the version of the shard's prediction file, `run` the run that wrote
#: it. The formats have neither lists of a fixed size nor half precision: embeddings are lists of float32.
LABEL_SCHEMA = pa.schema(
    [
        pa.field("model", pa.string()),
        *(pa.field(column.name, column.type) for column in prediction_schema()),
        pa.field("embedding", pa.list_(pa.float32())),
        pa.field("source", pa.string()),
        pa.field("output_version", pa.string()),
        pa.field("run", pa.string()),
        pa.field("published_at", pa.timestamp("us", tz="UTC")),
    ]
)

#: Names that carried columns do not keep, in lower case; `model` is the column of Hive partitions.
_RESERVED_COLUMNS = {*prediction_schema("float32", 1, label_names=True).names, "model"}


def carried_column(name: str) -> str:
    """Returns the name that a column of `input.carry` has in prediction files."""
    return f"input_{name}" if name.lower() in _RESERVED_COLUMNS else name


class ErrorCategory(StrEnum):
    """The categories of sample errors: the text of the column `error` before its first colon.

    A category has no colon and no digit, and never changes: `split_part(error, ':', 1)` groups errors in SQL.
    """

    INVALID_KEY = "invalid key"  # a key of more than 4 KiB, or a value that has no text
    INVALID_URI = "invalid uri"  # of a row of a table
    NO_IMAGE = "no image"  # no member with an image extension, or null in the image column
    IMAGE_NOT_FOUND = "image not found"  # an image file was deleted after the listing
    IMAGE_CHANGED = "image changed"  # an image file was replaced after the listing
    ACCESS_DENIED = "access denied"  # the store or server of an image file denies access
    DOWNLOAD_FAILED = "download failed"  # an image file could not be fetched: timeout, connection, status
    UNREADABLE_IMAGE = "unreadable image"  # a link or a special file in a tar
    INVALID_CARRIED_VALUE = "invalid carried value"  # too large, or not of the type in `input.carry`
    EMPTY_IMAGE = "empty image"  # zero bytes
    FILE_TOO_LARGE = "file too large"  # more bytes than `input.max_image_bytes`
    DIMENSIONS_TOO_LARGE = "dimensions too large"  # more pixels, or a longer side, than allowed
    UNSUPPORTED_FORMAT = "unsupported format"  # the first bytes are not of a supported image format
    CANNOT_DECODE = "cannot decode"  # a corrupt or truncated image
    MODEL_FAILED = "model failed"  # the model raised an error for the image
    NON_FINITE_OUTPUT = "non-finite output"  # the model returned NaN or infinity


_MAX_DETAIL = 2000  # characters
_CATEGORIES = {
    objects.ObjectNotFound: ErrorCategory.IMAGE_NOT_FOUND,
    objects.BucketNotFound: ErrorCategory.IMAGE_NOT_FOUND,
    objects.ObjectChanged: ErrorCategory.IMAGE_CHANGED,
    objects.AccessDenied: ErrorCategory.ACCESS_DENIED,
    objects.ObjectTooLarge: ErrorCategory.FILE_TOO_LARGE,
}
#: Categories of images that could not be fetched. Their rows have no target.
READ_ERRORS = frozenset({*_CATEGORIES.values(), ErrorCategory.DOWNLOAD_FAILED})

#: A text `<category>: <detail>` for the column `error`. Only `sample_error` creates one.
SampleError = NewType("SampleError", str)


def sample_error(category: ErrorCategory, detail: str) -> SampleError:
    """Returns the text of a sample's error: `<category>: <detail>`; a long detail is cut."""
    shown = remove_secrets(detail if len(detail) <= _MAX_DETAIL else f"{detail[:_MAX_DETAIL]}...")
    return SampleError(f"{category}: {shown.encode(errors='backslashreplace').decode()}")


def download_error(error: StorageError) -> SampleError:
    """Returns the text of a sample's error for an image file that could not be fetched."""
    return sample_error(_CATEGORIES.get(type(error), ErrorCategory.DOWNLOAD_FAILED), str(error))


@dataclass(frozen=True)
class Footer:
    """The metadata in a prediction file's footer. docs/reference/output-schema.md describes the fields.

    `statistics` are bytes of `serialize_table`, and `damage` is empty if all samples are labeled.
    """

    shard: str
    version: str
    format: str
    size: int
    fingerprint: str
    rows: int
    errors: int
    duplicate_keys: int
    unmatched_targets: int
    statistics: bytes
    damage: str = ""
    runtime: str = "torch"  # files of versions that had no other default lack this field


#: Fields of type str or int, in the order of the footer.
_FOOTER_FIELDS: list[Any] = [field for field in fields(Footer) if field.type in (str, int)]


def encode_predictions(predictions: pa.Table, footer: Footer) -> bytes:
    """Returns the Parquet file of one shard."""
    metadata = {field.name: str(getattr(footer, field.name)) for field in _FOOTER_FIELDS}
    # Base64, because the Parquet format requires text, and some readers reject other values.
    metadata["statistics"] = base64.b64encode(footer.statistics).decode()
    out = io.BytesIO()
    with pq.ParquetWriter(
        out,
        predictions.schema,
        compression="zstd",
        # Keys are unique and scores almost unique: a dictionary would only need space.
        use_dictionary=["shard", "label", "error", "uri", "version"],
        # Minimum and maximum per page (20,000 rows): 0.5 % more bytes, and readers can skip pages.
        write_page_index=True,
    ) as writer:
        writer.write_table(predictions, row_group_size=ROW_GROUP_ROWS)
        # Metadata of the schema is not used, because Arrow writes schema metadata twice.
        writer.add_key_value_metadata({_FOOTER + name: value for name, value in metadata.items()})
    return out.getvalue()


def read_footer(uri: str, file: io.IOBase) -> Footer:
    """Reads the footer of a prediction file; raises `StorageError` if the file is not a prediction file."""
    with content_errors(uri, "a prediction file"):
        found = pq.read_metadata(file).metadata or {}
        metadata = {name.decode(): text.decode() for name, text in found.items()}
        statistics = base64.b64decode(metadata[f"{_FOOTER}statistics"])
        texts = {field: metadata.get(_FOOTER + field.name, field.default) for field in _FOOTER_FIELDS}
        values = {field.name: field.type(text) for field, text in texts.items()}
        return Footer(**values, statistics=statistics)


def read_predictions(storage: Storage, uri: str, columns: Sequence[str]) -> tuple[Footer, pa.Table] | None:
    """Returns the footer and some columns of a prediction file; None if the file does not exist.

    Reads the current version, because the files of a copied partition have other versions than its manifest.

    Raises:
        StorageError: The file cannot be read, or is not a prediction file.
    """

    def read(file: io.BufferedReader) -> tuple[Footer, pa.Table]:
        with content_errors(uri, "a prediction file"):
            return read_footer(uri, file), read_table(file, columns).select(columns)

    found = storage.read_latest(uri, read)
    return None if found is None else found.content


def serialize_table(table: pa.Table) -> bytes:
    """Returns a small table, such as partial class statistics, as a compressed Arrow stream."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table.combine_chunks())
    return bytes(sink.getvalue())


def deserialize_table(data: bytes) -> pa.Table:
    """Returns the table from the bytes of `serialize_table`."""
    return pa.ipc.open_stream(data).read_all()


@dataclass(frozen=True)
class PredictionOptions:
    """The outputs of the model that a prediction file contains.

    Attributes:
        labels: Class names, by class id.
        topk: Number of best classes per image; at most the number of classes.
        embedding: "none", "float16" or "float32".
        embedding_width: Number of values of an embedding.
        label_names: Whether there are columns `target` and `topk_labels`.
        carry: Further columns, with the name of the Arrow type or None, as `input.carry`.
    """

    labels: Sequence[str]
    topk: int
    embedding: str
    embedding_width: int
    label_names: bool = False
    carry: Mapping[str, str | None] = field(default_factory=dict)
