"""The elements of the page: sections, and their charts and tables. `charts.svg` draws the charts."""

import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.text import escape_unprintable

#: Name and values of each of one or two series.
Series = Sequence[tuple[str, Sequence[float]]]


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars, the first at the top. The bars of two series are next to each other.

    Attributes:
        axis: title of the value axis.
        format_value: formats a value as text.
    """

    labels: Sequence[str]
    series: Series
    axis: str
    format_value: Callable[[float], str]

    @property
    def value_texts(self) -> list[str]:
        """The values as text."""
        return [self.format_value(value) for _, values in self.series for value in values]

    @property
    def description(self) -> str:
        """The first values as text."""
        rows = (
            f"{label}: {', '.join(f'{self.format_value(values[i])} {name}' for name, values in self.series)}"
            for i, label in enumerate(self.labels[:10])
        )
        return "; ".join(rows) + (f"; and {more} more" if (more := len(self.labels) - 10) > 0 else "")


@dataclass(frozen=True)
class Histogram:
    """Values for score bins of equal width over [0, 1]. The first series is an area, the second a line."""

    series: Series
    format_value: Callable[[float], str]


@dataclass(frozen=True)
class ReliabilityDiagram:
    """Accuracy and mean score for score bins of equal width over [0, 1]; NaN for an empty bin."""

    accuracy: Sequence[float]
    confidence: Sequence[float]


@dataclass(frozen=True)
class MatrixChart:
    """A square matrix of fractions of each row. The diagonal has its own color."""

    labels: Sequence[str]
    fractions: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Chart:
    """A table and, optionally, a drawing of its values.

    Attributes:
        columns, rows: headings and cells of the table, as text.
        description: text alternative of the drawing. If empty, the drawing's own description or the note.
        note: explanation of the drawing.
        text_columns: number of leading columns that contain text. The other columns contain numbers.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    drawing: BarChart | Histogram | ReliabilityDiagram | MatrixChart | None = None
    description: str = ""
    note: str = ""
    text_columns: int = 1

    @property
    def is_tall(self) -> bool:
        """Whether the drawing takes two rows of the grid."""
        is_long = isinstance(self.drawing, BarChart) and len(self.drawing.labels) > 12
        return is_long or isinstance(self.drawing, MatrixChart)


@dataclass
class ReportSection:
    """A section of the page. Each part may be empty.

    Attributes:
        id: HTML id, the target of links to the section.
        causes: from `ErrorCauses.to_record`.
        query: SQL query that lists all errors.
        unreadable_note: introduces `unreadable_shards`.
        unreadable_shards: errors of shards that could not be read.
        gallery: name of a class, its gallery rows of the highest, and its rows of the lowest confidence.
    """

    id: str
    title: str
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    charts: list[Chart] = field(default_factory=list)
    causes: Sequence[Mapping[str, Any]] = ()
    query: str = ""
    unreadable_note: str = ""
    unreadable_shards: Sequence[str] = ()
    gallery: list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = field(default_factory=list)


def max_value(series: Series) -> float:
    """Returns the maximum value of all series; at least a small positive number."""
    return max(1e-9, *(value for _, values in series for value in values))


def truncate_label(text: str, max_length: int = 26) -> str:
    """Shortens text from data to the space in a chart."""
    text = escape_unprintable(text)
    return text if len(text) <= max_length else f"{text[: max_length - 1]}…"


def text_width(texts: Iterable[str], size: float) -> float:
    """Estimates the width of the widest text in a sans-serif font of this size."""
    return max(
        size * (0.56 * len(text) + 0.44 * sum(unicodedata.east_asian_width(c) in "WF" for c in text))
        for text in texts
    )


def axis_ticks(maximum: float, count: int = 4) -> list[float]:
    """Returns zero and at most `count` round numbers up to the maximum; whole numbers if it is at least 1."""
    step = 10.0 ** math.floor(math.log10(maximum / count))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * (count + 1) > maximum)
    step = max(1, step) if maximum >= 1 else step
    return [i * step for i in range(int(maximum / step * (1 + 1e-9)) + 1)]
