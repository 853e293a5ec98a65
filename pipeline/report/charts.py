"""Measures for the charts of the page, which `charts.svg` draws."""

import math
import unicodedata
from collections.abc import Iterable, Sequence

from pipeline.text import escape_unprintable


def max_value(series: Sequence[tuple[str, Sequence[float]]]) -> float:
    """Returns the maximum value of named series; at least a small positive number."""
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


def score_bins(count: int) -> list[str]:
    """Returns the names of score bins of equal width over [0, 1]."""
    return [f"{i / count:.2f} to {(i + 1) / count:.2f}" for i in range(count)]
