"""The report for people: one self-contained HTML page that opens without a network, and runs no script.

It is made from what is stored: the record of a run, the class statistics, the manifest. So it can be made
again at any time, and against other labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.report.gallery import Item


@dataclass(frozen=True)
class Chart:
    """A drawing, and the numbers in it as a table.

    Attributes:
        title: of both.
        drawing: inline SVG.
        columns: the table's headings.
        rows: the table's cells, as text.
        note: what to know of it.
        names: how many of the columns, from the first, hold names; the others hold numbers.
    """

    title: str
    drawing: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    names: int = 1


@dataclass
class Section:
    """A part of the page, of whatever it has.

    Attributes:
        id: for links to it.
        title: its heading.
        notes: paragraphs.
        facts: by name.
        charts: with their numbers as tables.
        tables: without a drawing.
        causes: of errors, as `Causes.to_record` makes them.
        query: SQL that tells more, after `query_note`.
        unreadable: errors of shards, after `unreadable_note`.
        gallery: samples to look at, by class.
    """

    id: str
    title: str
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Chart] = field(default_factory=list)
    causes: Sequence[Mapping[str, Any]] = ()
    query: str = ""
    query_note: str = ""
    unreadable: Sequence[str] = ()
    unreadable_note: str = ""
    gallery: Sequence[tuple[str, Sequence[Item]]] = ()
