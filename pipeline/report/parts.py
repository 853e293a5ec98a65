"""What the page consists of: sections, and the charts and tables in them; `charts.svg` draws the charts."""

import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.report.gallery import GalleryItem
from pipeline.text import escape_unprintable

#: Name and values of each of one or two series.
Series = Sequence[tuple[str, Sequence[float]]]


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, the first on top; those of two series next to each other; `text` formats a value."""

    labels: Sequence[str]
    series: Series
    axis: str
    text: Callable[[float], str]

    @property
    def value_texts(self) -> list[str]:
        """The values as text."""
        return [self.text(value) for _, values in self.series for value in values]

    @property
    def description(self) -> str:
        """The first values in words."""
        rows = (
            f"{label}: {', '.join(f'{self.text(values[i])} {name}' for name, values in self.series)}"
            for i, label in enumerate(self.labels[:10])
        )
        return "; ".join(rows) + (f"; and {more} more" if (more := len(self.labels) - 10) > 0 else "")


@dataclass(frozen=True)
class Histogram:
    """Values for bins of the score of equal width over [0, 1]: the first series filled, the second a line."""

    series: Series
    text: Callable[[float], str]


@dataclass(frozen=True)
class Reliability:
    """Accuracy and mean score for bins of the score of equal width over [0, 1]; NaN in an empty bin."""

    accuracy: Sequence[float]
    confidence: Sequence[float]


@dataclass(frozen=True)
class Matrix:
    """Fractions of each row in a square of cells; the diagonal has its own color."""

    labels: Sequence[str]
    shares: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Chart:
    """A table and, where there is one, the drawing of its numbers.

    Attributes:
        columns, rows: headings and cells of the table, as text.
        description: the drawing in words, for people who don't see it; else that of bars, or the note.
        note: explains the drawing.
        names: number of columns, from the first, that hold names; the others hold numbers.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    drawing: Bars | Histogram | Reliability | Matrix | None = None
    description: str = ""
    note: str = ""
    names: int = 1


@dataclass
class Section:
    """A section of the page; every part of it may be empty.

    Attributes:
        id: target of links to the section.
        causes: from `ErrorCauses.to_record`.
        query: SQL that lists all errors.
        unreadable: errors of shards, after `unreadable_note`.
    """

    id: str
    title: str
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    charts: list[Chart] = field(default_factory=list)
    causes: Sequence[Mapping[str, Any]] = ()
    query: str = ""
    unreadable: Sequence[str] = ()
    unreadable_note: str = ""
    gallery: Sequence[tuple[str, Sequence[GalleryItem]]] = ()


def largest(series: Series) -> float:
    """The largest value of all series, above 0."""
    return max(1e-9, *(value for _, values in series for value in values))


def short(text: str, longest: int = 26) -> str:
    """Text from data, no longer than a chart has room for."""
    text = escape_unprintable(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def text_width(texts: Iterable[str], size: float) -> float:
    """Estimated width of the widest text in a sans-serif font of this size."""
    return max(
        size * (0.56 * len(text) + 0.44 * sum(unicodedata.east_asian_width(c) in "WF" for c in text))
        for text in texts
    )


def ticks(largest: float, count: int = 4) -> list[float]:
    """Zero and at most `count` round numbers up to the largest value; whole numbers if it is 1 or more."""
    step = 10.0 ** math.floor(math.log10(largest / count))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * (count + 1) > largest)
    step = max(1, step) if largest >= 1 else step
    return [i * step for i in range(int(largest / step * (1 + 1e-9)) + 1)]
