"""What the charts of the report show; the macros in the template `charts.svg` draw them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.text import printable


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, the first on top; those of two series next to each other.

    Attributes:
        labels: names of the bars.
        series: name and values of one or two series.
        axis: title of the axis of values.
        text: formats a value.
    """

    labels: Sequence[str]
    series: Sequence[tuple[str, Sequence[float]]]
    axis: str
    text: Callable[[float], str]

    @property
    def label_width(self) -> float:
        """Room for the labels."""
        return max(text_width(short(label), 13) for label in self.labels)

    @property
    def value_width(self) -> float:
        """Room for the values' text."""
        return max(text_width(self.text(value), 11) for _, values in self.series for value in values)


@dataclass(frozen=True)
class Histogram:
    """Values by score: the first series filled, the second, if there is one, as a line.

    Attributes:
        series: name and values of one or two series, for bins of equal width over [0, 1].
        text: formats a value.
    """

    series: Sequence[tuple[str, Sequence[float]]]
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

    @property
    def label_width(self) -> float:
        """Room for the labels."""
        return max(text_width(short(label, 18), 11) for label in self.labels)


def largest(series: Sequence[tuple[str, Sequence[float]]]) -> float:
    """The largest value of all series, above 0."""
    return max(1e-9, *(value for _, values in series for value in values))


def short(text: str, longest: int = 26) -> str:
    """Text from data, no longer than a chart has room for."""
    text = printable(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def text_width(text: str, size: float) -> float:
    """Estimated width of text in a sans-serif font of this size."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return size * (0.56 * len(text) + 0.44 * wide)


def ticks(largest: float, count: int = 4) -> list[float]:
    """Zero and at most `count` round numbers up to the largest value; whole numbers if it is 1 or more."""
    step = 10.0 ** math.floor(math.log10(largest / count))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * (count + 1) > largest)
    step = max(1, step) if largest >= 1 else step
    return [i * step for i in range(int(largest / step * (1 + 1e-9)) + 1)]
