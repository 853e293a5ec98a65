"""Samples, errors of shards, and options of readers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import pyarrow as pa

from pipeline.config import InputConfig, ReadConfig
from pipeline.predictions import ErrorCategory, SampleError, sample_error
from pipeline.read.targets import Targets

#: Maximum size of a key in UTF-8.
MAX_KEY_BYTES = 4096
#: Maximum size of the values of `input.carry` in a row: the driver holds those of a shard.
MAX_CARRIED_BYTES = 64 * 1024
_MAX_CAUSE = 2000  # characters of a cause that is kept


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


def scalar_array(values: Sequence[pa.Scalar]) -> pa.Array:
    """Returns values of one type as an array; `pa.array` fails for null lists."""
    return pa.array([value if value.is_valid else None for value in values], values[0].type)


def describe_excess(size: int, limit: int) -> str:
    """Returns a phrase that reports a size in bytes over a limit."""
    return f"has {size} bytes, more than the limit of {limit}"
