"""Samples, and what readers need to know. Reading itself belongs to the modules of the formats."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from pipeline.config import InputConfig
from pipeline.predictions import ErrorCategory, SampleError, sample_error

_MAX_LABEL_ID = 2**31  # of the predictions' int32 column
IGNORE_HINT = "set `input.labels: false` to ignore labels"


class UnreadableShardError(Exception):
    """A format's reader can't read the shard; the message is the cause."""


class ShardError(Exception):
    """The shard can't be read; the message names its URI, the place in it and the cause.

    Attributes:
        transient: whether the cause is the storage, not the shard: a later attempt may succeed.
    """

    def __init__(self, uri: str, cause: str, transient: bool = False) -> None:
        super().__init__(uri, cause, transient)
        self.uri = uri
        self.transient = transient

    def __str__(self) -> str:
        return f"{self.uri}: {self.args[1]}"


@dataclass(slots=True)
class Sample:
    """One image, or an error in its place.

    Attributes:
        key: its name in the shard. Not always unique: shard and position identify a sample.
        image: the encoded image; None where `error` is set.
        target: the dataset's own label, as a class index.
    """

    key: str
    image: bytes | None
    target: int | None = None
    error: SampleError | None = None


@dataclass(frozen=True)
class ReadOptions:
    """What readers need to know: fields of `InputConfig` and `ReadConfig`, and the model's classes.

    Attributes:
        class_ids: class indices by class name, for labels that are names.
        num_labels: class indices are below this; by default, any that fits an int32 is allowed.
    """

    labels: bool = True
    label_field: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    key_column: str | None = None
    class_ids: Mapping[str, int] = field(default_factory=dict)
    num_labels: int = _MAX_LABEL_ID
    max_image_bytes: int = 256 * 1024**2
    fetches: int = 4

    @classmethod
    def from_config(cls, section: InputConfig, labels: Sequence[str], fetches: int = 4) -> Self:
        """Makes the options of an input and of a model's class names.

        A name that several classes share, as ImageNet's two cranes do, names none of them.
        """
        times = Counter(labels)
        return cls(
            class_ids={name: i for i, name in enumerate(labels) if times[name] == 1},
            num_labels=len(labels),
            fetches=fetches,
            **section.model_dump(exclude={"uri", "format", "max_image_pixels"}),
        )

    def size_error(self, size: int) -> SampleError | None:
        """Describes what is wrong with an encoded image of this size; None if nothing is."""
        if size <= self.max_image_bytes:
            return None
        detail = f"the image {too_large(size, self.max_image_bytes)} (input.max_image_bytes)"
        return sample_error(ErrorCategory.FILE_TOO_LARGE, detail)

    def parse_target(self, label: object) -> tuple[int | None, SampleError | None]:
        """Returns the class index of a label, None for none, and the error of a label that is no class.

        Text is a class name, or else an index.
        """
        found = label
        if isinstance(label, str):
            text = label.strip()
            found = self.class_ids.get(text, whole_number(text))
        elif isinstance(label, float) and label.is_integer():  # pandas' integers next to nulls
            found = int(label)
        if label is None or found == -1 or (isinstance(label, float) and math.isnan(label)):
            return None, None
        shown = repr(label)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        if not isinstance(found, int) or isinstance(found, bool):
            return None, _invalid_label(f"{shown} is not a class of the model")
        if not 0 <= found < self.num_labels:
            return None, _invalid_label(f"{shown} is not in 0..{self.num_labels - 1}")
        return found, None


def _invalid_label(detail: str) -> SampleError:
    return sample_error(ErrorCategory.INVALID_LABEL, f"{detail}; {IGNORE_HINT}")


def whole_number(text: str) -> int | None:
    """Returns the number that a text is, in ASCII digits; None where it is none."""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None


def too_large(size: int, limit: int) -> str:
    """Says that a size in bytes is over a limit."""
    return f"has {size} bytes, more than the limit of {limit}"
