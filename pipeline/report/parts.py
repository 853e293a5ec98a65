"""What the page consists of: sections, and the charts and tables in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.report.charts import Bars, Histogram, Matrix, Reliability
    from pipeline.report.gallery import Item


@dataclass(frozen=True)
class Chart:
    """A table and, where there is one, the drawing of its numbers.

    Attributes:
        title: heading of both.
        columns: headings of the table's columns.
        rows: cells of the table, as text.
        drawing: what is drawn.
        description: the drawing in words, for people who don't see it; else the note.
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
        title: heading.
        notes: paragraphs.
        facts: values by name.
        charts: charts and tables.
        causes: causes of errors, from `Causes.to_record`.
        query: SQL that lists more, after `query_note`.
        unreadable: errors of shards, after `unreadable_note`.
        gallery: images by class.
    """

    id: str
    title: str
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    charts: list[Chart] = field(default_factory=list)
    causes: Sequence[Mapping[str, Any]] = ()
    query: str = ""
    query_note: str = ""
    unreadable: Sequence[str] = ()
    unreadable_note: str = ""
    gallery: Sequence[tuple[str, Sequence[Item]]] = ()
