"""Samples, and what readers need to know. Reading itself belongs to the modules of the formats."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pipeline.config import InputConfig


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
    error: str | None = None


@dataclass(frozen=True)
class ReadOptions:
    """What readers need to know: fields of `InputConfig` and `ReadConfig`, and the model's classes.

    Attributes:
        class_ids: pairs of class name and class index, for labels that are names.
        num_labels: class indices are below this; None allows any that fits an int32.
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

    @classmethod
    def of(cls, section: InputConfig, labels: Sequence[str], fetches: int = 4) -> Self:
        """Makes the options of an input and of a model's class names.

        A name that several classes share, as ImageNet's two cranes do, names none of them.
        """
        times = Counter(labels)
        return cls(
            class_ids=tuple((name, i) for i, name in enumerate(labels) if times[name] == 1),
            num_labels=len(labels),
            fetches=fetches,
            **section.model_dump(exclude={"uri", "format", "max_image_pixels"}),
        )

    def size_error(self, size: int) -> str | None:
        """Describes what is wrong with an encoded image of this size; None if nothing is."""
        if size <= self.max_image_bytes:
            return None
        return f"the image {too_large(size, self.max_image_bytes)} (input.max_image_bytes)"


def too_large(size: int, limit: int) -> str:
    """Says that a size in bytes is over a limit."""
    return f"has {size} bytes, more than the limit of {limit}"
