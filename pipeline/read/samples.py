"""Samples, errors of shards, and options of readers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Self

import pyarrow as pa

from pipeline.config import InputConfig, ReadConfig
from pipeline.predictions import ErrorCategory, SampleError, sample_error
from pipeline.read.targets import Targets
from pipeline.text import arrow_type

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
    """Options of readers: fields of `InputConfig` and `ReadConfig`, and the classes of the model.

    Attributes:
        class_names: Names of the model's classes, by class index. Without names, every index is a class.
    """

    labels: bool = True
    label_from: str | None = None
    label_field: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    key_column: str | None = None
    class_names: Sequence[str] = ()
    max_image_bytes: int = 256 * 1024**2
    concurrent_fetches: int = 4
    concurrent_downloads: int = 64
    downloads_per_host: int = 16
    max_page_bytes: int = 2 * 1024**3
    timeout_s: float = 600
    max_shard_samples: int = 1_000_000
    key: str = "first-dot"
    image_member: str | None = None
    on_damaged_shard: str = "skip"
    carry: Mapping[str, str | None] = field(default_factory=dict)
    target_names: Sequence[str] | None = None
    target_map: Mapping[str, str] | None = None

    @classmethod
    def from_config(cls, section: InputConfig, labels: Sequence[str], read: ReadConfig | None = None) -> Self:
        """Creates options from a configuration, see `load_targets`, and the class names of a model."""
        names = {each.name for each in fields(cls)}
        settings = (read or ReadConfig()).model_dump(include=names) | section.model_dump(include=names)
        return cls(class_names=labels, **settings)

    @cached_property
    def targets(self) -> Targets:
        """Finds the classes of labels."""
        return Targets(self.class_names, self.target_names, self.target_map or {})

    def check_count(self, count: int) -> None:
        """Raises `UnreadableShardError` if a shard has too many samples."""
        if count > self.max_shard_samples:
            limit = f"more than {self.max_shard_samples:,} samples (read.max_shard_samples)"
            remedy = "split the shard, lower read.split_bytes, or raise the limit"
            raise UnreadableShardError(f"the shard has {limit}; {remedy}")

    def size_error(self, size: int) -> SampleError | None:
        """Returns the error of an encoded image of this size in bytes; None if the size is allowed."""
        if size <= self.max_image_bytes:
            return None
        detail = f"the image {describe_excess(size, self.max_image_bytes)} (input.max_image_bytes)"
        return sample_error(ErrorCategory.FILE_TOO_LARGE, detail)

    def set_carried(self, sample: Sample) -> Sample:
        """Converts the carried values to their types; makes a value that is too large or wrong an error."""
        if not self.carry:
            return sample
        carried, size, problem = list[pa.Scalar](), 0, None
        values = sample.carried or [pa.scalar(None)] * len(self.carry)
        for (name, kind), value in zip(self.carry.items(), values, strict=True):
            is_null = pa.types.is_null(value.type)
            to = arrow_type(kind) if kind else pa.string() if is_null else value.type
            size += scalar_array([value]).nbytes
            try:
                if size > MAX_CARRIED_BYTES:
                    raise ValueError(f"the carried data {describe_excess(size, MAX_CARRIED_BYTES)}")
                carried.append(value if to == value.type else value.cast(to))
            except (ValueError, NotImplementedError) as error:
                carried.append(pa.scalar(None, to))
                detail = f"{name!r}: {error}; change input.carry"
                problem = problem or sample_error(ErrorCategory.INVALID_CARRIED_VALUE, detail)
        sample.carried = tuple(carried)
        return sample if problem is None or sample.error is not None else sample.fail(problem)

    def set_target(self, sample: Sample) -> Sample:
        """Sets the target of a sample from its label, unless the label has a problem already."""
        if sample.error is None and sample.unmatched is None:
            sample.target, sample.unmatched = self.targets.find(sample.label, sample.label_names)
        return sample


def scalar_array(values: Sequence[pa.Scalar]) -> pa.Array:
    """Returns values of one type as an array; `pa.array` fails for null lists."""
    return pa.array([value if value.is_valid else None for value in values], values[0].type)


def describe_excess(size: int, limit: int) -> str:
    """Returns a phrase that reports a size in bytes over a limit."""
    return f"has {size} bytes, more than the limit of {limit}"
