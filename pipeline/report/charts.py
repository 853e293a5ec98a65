"""Charts of the report as inline SVG: without scripts, in the page's colours, with a title and a description.

Matplotlib draws them. It takes a second to import, so that this module is imported only to write a report.
"""

from __future__ import annotations

import io
import itertools
import logging
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from pipeline.text import printable

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its caches


#: Stand-ins, in the drawing, for what the page's style says.
_INK, _MUTED, _LINE, _A, _B = ("#010101", "#020202", "#030303", "#040404", "#050505")

_COLOURS = {
    _INK: "currentColor",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
    _A: "var(--a)",
    _B: "var(--b)",
}

_SERIES = (_A, _B)

_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a label is one
    "font.size": 13,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": _LINE,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
}

_SVG = "http://www.w3.org/2000/svg"

_WIDTH = 460

_LONGEST = 26

_FONT = re.compile(r"font: ([\d.]+px) [^;]+|font-family: [^;]+")


ET.register_namespace("", _SVG)

ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def short(text: str, longest: int = _LONGEST) -> str:
    """Text from data as a chart has room for."""
    text = printable(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def bars(
    title: str,
    description: str,
    labels: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    axis: str,
    number: Callable[[float], str],
) -> Markup:
    """Horizontal bars, the first on top; of two series side by side."""
    height = 58 + len(labels) * (16 + 10 * len(series))
    with _figure(title, height) as (figure, axes):
        thick = 0.76 / len(series)
        places = np.arange(len(labels))
        for i, (name, values) in enumerate(series):
            drawn = axes.barh(
                places + (i + 0.5) * thick - 0.38, values, thick * 0.9, color=_SERIES[i], label=name
            )
            axes.bar_label(drawn, [number(value) for value in values], padding=3, fontsize=11)
        axes.set_yticks(places, [short(label) for label in labels])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.16 * max([value for _, values in series for value in values] + [1e-9]))
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_xlabel(axis)
        _legend(axes, len(series))
        return _inlined(figure, title, description)


def histogram(
    title: str,
    description: str,
    edges: np.ndarray,
    series: Sequence[tuple[str, np.ndarray]],
    axis: str,
    number: Callable[[float], str],
) -> Markup:
    """Bins of equal width: the first series filled, the second, where there is one, a line across it."""
    with _figure(title, 230) as (figure, axes):
        for i, (name, values) in enumerate(series):
            if i == 0:
                axes.stairs(
                    values, edges, color=_A, fill=True, alpha=1 if len(series) == 1 else 0.5, label=name
                )
            else:
                axes.stairs(values, edges, color=_INK, linewidth=1.5, label=name)
        axes.set_xlim(edges[0], edges[-1])
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        axes.locator_params(axis="y", nbins=4)
        axes.grid(axis="y")
        axes.set_xlabel(axis)
        _legend(axes, len(series))
        return _inlined(figure, title, description)


def reliability(
    title: str, description: str, edges: np.ndarray, accuracy: np.ndarray, confidence: np.ndarray
) -> Markup:
    """Accuracy by score, and the diagonal on which the two are equal."""
    with _figure(title, 320) as (figure, axes):
        known = ~np.isnan(accuracy)
        width = edges[1] - edges[0]
        axes.bar(edges[:-1][known], accuracy[known], width * 0.94, align="edge", color=_A, label="accuracy")
        axes.plot(confidence[known], confidence[known], "D", color=_B, markersize=6, label="mean score")
        axes.plot([0, 1], [0, 1], color=_INK, linestyle="--", linewidth=1, label="calibrated")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        for direction in (axes.xaxis, axes.yaxis):
            direction.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="y")
        axes.set_xlabel("score")
        axes.set_ylabel("accuracy")
        _legend(axes, 3)
        return _inlined(figure, title, description)


def matrix(title: str, description: str, labels: Sequence[str], shares: np.ndarray) -> Markup:
    """A square of cells, the fuller the larger the share of their row; the diagonal in another colour."""
    count = len(labels)
    with _figure(title, 150 + 22 * count) as (figure, axes):
        for row, column in itertools.product(range(count), repeat=2):
            if shares[row, column] > 0:
                colour = _A if row == column else _B
                alpha = 0.1 + 0.9 * float(np.sqrt(min(1.0, shares[row, column])))
                axes.add_patch(
                    Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, color=colour, alpha=alpha, linewidth=0)
                )
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_ylim(count - 0.5, -0.5)
        names = [short(label, 18) for label in labels]
        axes.set_yticks(range(count), names, fontsize=11)
        axes.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=11)
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axes.grid(which="minor")
        axes.tick_params(which="both", length=0)
        axes.set_xlabel("labelled as")
        axes.set_ylabel("target")
        handles = [Patch(color=_A, label="right"), Patch(color=_B, label="confused")]
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=11)
        return _inlined(figure, title, description)


@contextmanager
def _figure(title: str, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A drawing of some pixels' height, in this module's style, whatever is configured on this machine."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE | {"svg.hashsalt": title})
        figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
        yield figure, figure.add_subplot()


def _legend(axes: Axes, count: int) -> None:
    """Above the drawing, where there is more than one thing to tell apart."""
    if count > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=count, fontsize=11, borderaxespad=0)


def _inlined(figure: Figure, title: str, description: str) -> Markup:
    """The drawing as an element of the page; all text in it is escaped by the XML writers."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser's font has it
        FigureCanvasSVG(figure).print_svg(
            stream, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    root = ET.fromstring(stream.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    used = set(re.findall(r"#([\w-]+)", " ".join(v for e in root.iter() for v in e.attrib.values())))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        for name in ("style", "fill", "stroke"):
            if name in element.attrib:
                element.set(name, _styled(element.attrib[name]))
    name = re.sub(r"\W+", "-", title.lower())
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        label = ET.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{tag}"})
        label.text = printable(text)
        root.insert(place, label)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{name}-title",
        "aria-describedby": f"{name}-desc",
    }
    return Markup(ET.tostring(root, encoding="unicode"))


def _styled(style: str) -> str:
    for stand_in, colour in _COLOURS.items():
        style = style.replace(stand_in, colour)
    return _FONT.sub(lambda found: f"font: {found[1]} system-ui, sans-serif" if found[1] else "", style)
