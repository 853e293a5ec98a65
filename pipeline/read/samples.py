"""Readers: a shard in, its samples out, one at a time, in the same order every time.

WebDataset tars, Parquet files with image bytes, and groups of loose images. Nothing is decoded here,
and pickles are never loaded. A bad sample is a sample with an error; a bad shard is a `ShardError`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import InputConfig


class ShardError(Exception):
    """The shard can't be read; the message names its URI, the place in it and the cause.

    Attributes:
        uri: The shard's URI.
        cause: The message without the URI.
        transient: Whether the cause is the storage, not the shard: a later attempt may succeed.
    """

    def __init__(self, uri: str, cause: str, transient: bool = False) -> None:
        super().__init__(uri, cause, transient)
        self.uri = uri
        self.cause = cause
        self.transient = transient

    def __str__(self) -> str:
        return f"{self.uri}: {self.cause}"


@dataclass(slots=True)
class Sample:
    """One image, or what stands in its place.

    Attributes:
        key: Its name in the shard. Not always unique: shard and position identify a sample.
        image: The encoded image, null where `error` is set.
        target: The shard's own label, as a class index; null where there is none.
        error: Why there is no image to classify, null where there is one.
    """

    key: str
    image: bytes | None
    target: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class ReadOptions:
    """What readers must know; hashable and picklable.

    Attributes:
        labels: Read the samples' own labels. Without, every target is null.
        label_field: WebDataset: the (dotted) field of `.json` that holds the label, not `.cls`.
        image_column: Parquet: the image's column; found by name and type if null.
        label_column: Parquet: the label's column; no labels if null.
        key_column: Parquet: the key's column; if null, the image's path, else the row's number.
        class_ids: Pairs of class name and class index, for labels that are names.
        num_labels: Class indices go from 0 to below this; null: any that fits an int32.
        max_image_bytes: Larger images become error rows (unread, in tars and loose images).
        fetches: Ranges of a tar, of 8 MiB, that are fetched at once.
    """

    labels: bool = True
    label_field: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    key_column: str | None = None
    class_ids: tuple[tuple[str, int], ...] = ()
    num_labels: int | None = None
    max_image_bytes: int = 256 * 1024**2
    fetches: int = 4


def too_large(what: str, size: int, limit: int) -> str:
    setting = " (input.max_image_bytes)" if what == "image" else ""
    return f"the {what} has {size} bytes, more than the limit of {limit}{setting}"


def read_options(section: InputConfig, labels: Sequence[str], fetches: int = 4) -> ReadOptions:
    """What readers need to know of the input, and of the model's classes.

    Of classes that share a name, as ImageNet's two cranes do, none is told by it.
    """
    times = Counter(labels)
    return ReadOptions(
        labels=section.labels,
        label_field=section.label_field,
        image_column=section.image_column,
        label_column=section.label_column,
        key_column=section.key_column,
        class_ids=tuple((name, i) for i, name in enumerate(labels) if times[name] == 1),
        num_labels=len(labels),
        max_image_bytes=section.max_image_bytes,
        fetches=fetches,
    )
