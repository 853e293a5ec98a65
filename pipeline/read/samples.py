"""Samples, errors of shards, and options of readers."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Self

import pyarrow as pa

from pipeline.config import InputConfig, ReadConfig
from pipeline.predictions import ErrorCategory, SampleError, sample_error

_MAX_LABEL_ID = 2**31  # limit of the int32 column `target_id`
_MAX_CAUSE = 2000  # characters of a cause that is kept


class UnreadableShardError(Exception):
    """The reader of a format cannot read the shard; the message is the cause."""


class ReadTimeoutError(UnreadableShardError):
    """Reading took longer than its deadline, possibly because the storage is slow."""


class ShardError(Exception):
    """The shard cannot be read. If the error is transient, a later attempt may succeed."""

    def __init__(self, uri: str, cause: str, transient: bool = False) -> None:
        super().__init__(uri, cause[:_MAX_CAUSE], transient)
        self.uri = uri
        self.transient = transient

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
    carry: Mapping[str, str | None] = field(default_factory=dict)

    @classmethod
    def from_config(cls, section: InputConfig, labels: Sequence[str], read: ReadConfig | None = None) -> Self:
        """Creates options from a configuration and the class names of a model."""
        return cls(
            class_names=labels,
            **(read or ReadConfig()).model_dump(
                include={
                    "concurrent_fetches",
                    "concurrent_downloads",
                    "downloads_per_host",
                    "max_page_bytes",
                    "timeout_s",
                    "max_shard_samples",
                }
            ),
            **section.model_dump(
                include={
                    "labels",
                    "label_from",
                    "label_field",
                    "image_column",
                    "label_column",
                    "key_column",
                    "max_image_bytes",
                    "key",
                    "image_member",
                    "carry",
                }
            ),
        )

    @cached_property
    def class_ids(self) -> dict[str, int]:
        """Class indices by name, without names of several classes, such as "crane" in ImageNet."""
        times = Counter(self.class_names)
        return {name: i for i, name in enumerate(self.class_names) if times[name] == 1}

    def check_count(self, count: int) -> None:
        """Raises `UnreadableShardError` if a shard has too many samples."""
        if count > self.max_shard_samples:
            limit = f"more than {self.max_shard_samples:,} samples (read.max_shard_samples)"
            raise UnreadableShardError(f"the shard has {limit}; split the shard, or raise the limit")

    def size_error(self, size: int) -> SampleError | None:
        """Returns the error of an encoded image of this size in bytes; None if the size is allowed."""
        if size <= self.max_image_bytes:
            return None
        detail = f"the image {describe_excess(size, self.max_image_bytes)} (input.max_image_bytes)"
        return sample_error(ErrorCategory.FILE_TOO_LARGE, detail)

    def set_target(self, sample: Sample) -> Sample:
        """Sets the target of a sample from its label, unless the label has a problem already."""
        if sample.error is None and sample.unmatched is None:
            sample.target, sample.unmatched = self.parse_target(sample.label, sample.label_names)
        return sample

    def parse_target(
        self, label: object, names: Sequence[str] | None = None
    ) -> tuple[int | None, str | None]:
        """Returns the class index of a label, and why a label has none; both are None for null, NaN and -1.

        Text is a class name or a class index. A number is an index into `names`, the dataset's own class
        names, or else a class index.
        """
        class_id = label
        if isinstance(label, str):
            text = label.strip()
            class_id = self.class_ids.get(text, parse_integer(text.removesuffix(".0")))
        elif isinstance(label, float | Decimal) and math.isfinite(label) and label == round(label):
            class_id = int(label)  # pandas: integers with nulls are floats
        if label is None or class_id == -1 or (isinstance(label, float) and math.isnan(label)):
            return None, None
        shown = repr(label)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        if not isinstance(class_id, int) or isinstance(class_id, bool):
            return None, f"{shown} is not a class of the model"
        limit = (len(self.class_names) or _MAX_LABEL_ID) if names is None else len(names)
        if not 0 <= class_id < limit:
            return None, f"{shown} is not in 0..{limit - 1}"
        if names is not None and not isinstance(label, str):
            name = names[class_id]
            if name not in self.class_names[class_id : class_id + 1]:  # otherwise the same index and name
                found = self.class_ids.get(name)
                return found, None if found is not None else f"{name!r} is not a class of the model"
        return class_id, None


def parse_integer(text: str) -> int | None:
    """Returns the integer that a text represents in ASCII digits; None for other text."""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None


def describe_excess(size: int, limit: int) -> str:
    """Returns a phrase that reports a size in bytes over a limit."""
    return f"has {size} bytes, more than the limit of {limit}"
