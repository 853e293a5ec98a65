"""Samples, errors of shards, and options of readers."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import pyarrow as pa

from pipeline.config import InputConfig, ReadConfig
from pipeline.predictions import ErrorCategory, SampleError, sample_error
from pipeline.read.shards import Shard
from pipeline.read.targets import Targets, folder_label, hive_label
from pipeline.text import arrow_type

#: Maximum size of a key in UTF-8, and the part of a longer key that is kept.
MAX_KEY_BYTES, _KEPT_KEY_BYTES = 4096, 1000
#: Maximum size of the values of `input.carry` in a row: the driver holds those of a shard.
MAX_CARRIED_BYTES = 64 * 1024
_MAX_CAUSE, _MAX_MESSAGE = 2000, 200  # characters of a cause, and of why a label is no target


class UnreadableShardError(Exception):
    """The reader of a format cannot read the shard; the message is the cause."""


class ReadTimeoutError(UnreadableShardError):
    """Reading took longer than its deadline, possibly because the storage is slow."""


class ShardError(Exception):
    """The shard cannot be read. If the error is transient, a later attempt may succeed.

    A damaged shard has `readable` samples before the error. With `keep`, they are labeled.
    """

    def __init__(
        self, uri: str, cause: str, transient: bool = False, keep: bool = False, readable: int = 0
    ) -> None:
        super().__init__(uri, cause[:_MAX_CAUSE], transient, keep, readable)
        self.uri = uri
        self.transient = transient
        self.keep = keep
        self.readable = readable

    def __str__(self) -> str:
        return f"{self.uri}: {self.args[1]}"


@dataclass(slots=True)
class Sample:
    """One image with its key and target, or an error.

    Attributes:
        key: Name in the shard. A key may occur several times: only shard and index identify a sample.
        image: The encoded image; None if `error` is set.
        target: Class index of the dataset's own label.
        unmatched: Why the dataset's own label is not a target, if it has one.
        label: The dataset's own label as the reader found it.
        label_names: The dataset's own class names, by integer label, if the file has them.
        uri, version: URI and version of the object with the image; None if it is the shard's own object.
        offset, size: Position of the encoded image in an uncompressed tar, in bytes.
        merged: Number of further images of the sample, which are not labeled.
        carried: Values of the columns of `input.carry`, in their order; empty without such columns.
    """

    key: str
    image: bytes | None
    target: int | None = None
    error: SampleError | None = None
    unmatched: str | None = None
    label: object = field(default=None, compare=False)
    label_names: Sequence[str] | None = field(default=None, compare=False)
    uri: str | None = field(default=None, compare=False)
    version: str | None = field(default=None, compare=False)
    offset: int | None = field(default=None, compare=False)
    size: int | None = field(default=None, compare=False)
    merged: int = field(default=0, compare=False)
    carried: tuple[pa.Scalar, ...] = field(default=(), compare=False)

    def fail(self, error: SampleError) -> Self:
        """Makes the sample an error row, without image and label."""
        self.image, self.error, self.label, self.unmatched = None, error, None, None
        return self


@dataclass(frozen=True)
class ReadOptions:
    """How the samples of shards are read.

    Attributes:
        input: Without the files of targets, see `load_targets`. Shards have their own URIs.
        class_names: Names of the model's classes, by class index. Without names, every index is a class.
    """

    input: InputConfig = field(default_factory=InputConfig.model_construct)
    read: ReadConfig = field(default_factory=ReadConfig)
    class_names: Sequence[str] = ()

    @cached_property
    def targets(self) -> Targets:
        """Finds the classes of labels; without files of targets that are not loaded."""
        names, mapping = self.input.target_names, self.input.target_map
        names = names if isinstance(names, list) else None
        return Targets(self.class_names, names, mapping if isinstance(mapping, dict) else {})

    def check_count(self, count: int) -> None:
        """Raises `UnreadableShardError` if a shard has too many samples."""
        if count > self.read.max_shard_samples:
            limit = f"more than {self.read.max_shard_samples:,} samples (read.max_shard_samples)"
            remedy = "split the shard, lower read.split_bytes, or raise the limit"
            raise UnreadableShardError(f"the shard has {limit}; {remedy}")

    def size_error(self, size: int) -> SampleError | None:
        """Returns the error of an encoded image of this size in bytes; None if the size is allowed."""
        limit = self.input.max_image_bytes
        if size <= limit:
            return None
        detail = f"the image {describe_excess(size, limit)} (input.max_image_bytes)"
        return sample_error(ErrorCategory.FILE_TOO_LARGE, detail)


def complete_sample(sample: Sample, shard: Shard, options: ReadOptions) -> Sample:
    """Returns a sample of a reader or of `list_samples` with its target, and with texts within limits."""
    key = sample.key.encode(errors="backslashreplace")  # names of local files may have surrogates
    sample.key = key.decode()
    if len(key) > MAX_KEY_BYTES:
        start, digest = key[:_KEPT_KEY_BYTES].decode(errors="ignore"), hashlib.blake2b(key, digest_size=16)
        sample.key = f"{start}...{digest.hexdigest()}"
        sample.fail(sample_error(ErrorCategory.INVALID_KEY, f"the key has more than {MAX_KEY_BYTES} bytes"))
    if options.input.carry:
        _convert_carried(sample, options.input.carry)
    if sample.error is not None:
        return sample
    if options.input.labels and options.input.label_from == "folder":
        folder = folder_label((sample.uri or "") if shard.format == "table" else sample.key)
        if shard.format == "parquet":
            sample.label, sample.unmatched = hive_label(shard.object.uri, options.input.label_column)
        elif folder is not None:  # without a folder, the sample of a tar keeps its own label
            sample.label, sample.unmatched = folder, None
    if sample.unmatched is None:
        sample.target, sample.unmatched = options.targets.find(sample.label, sample.label_names)
    sample.unmatched = sample.unmatched and sample.unmatched[:_MAX_MESSAGE]
    return sample


def _convert_carried(sample: Sample, types: Mapping[str, str | None]) -> None:
    """Converts the carried values to their types; a sample with a value too large or wrong is an error."""
    values = sample.carried or [pa.scalar(None)] * len(types)
    carried, size = list[pa.Scalar](), 0
    for (name, kind), value in zip(types.items(), values, strict=True):
        default = pa.string() if pa.types.is_null(value.type) else value.type
        to = arrow_type(kind) if kind else default
        size += scalar_array([value]).nbytes
        try:
            if size > MAX_CARRIED_BYTES:
                raise ValueError(f"the carried data {describe_excess(size, MAX_CARRIED_BYTES)}")
            carried.append(value if to == value.type else value.cast(to))
        except (ValueError, NotImplementedError) as error:
            carried.append(pa.scalar(None, to))
            if sample.error is None:
                detail = f"{name!r}: {error}; change input.carry"
                sample.fail(sample_error(ErrorCategory.INVALID_CARRIED_VALUE, detail))
    sample.carried = tuple(carried)


def scalar_array(values: Sequence[pa.Scalar]) -> pa.Array:
    """Returns values of one type as an array; `pa.array` fails for null lists."""
    return pa.array([value if value.is_valid else None for value in values], values[0].type)


def describe_excess(size: int, limit: int) -> str:
    """Returns a phrase that reports a size in bytes over a limit."""
    return f"has {size} bytes, more than the limit of {limit}"
