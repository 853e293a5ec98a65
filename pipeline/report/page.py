"""The report: one self-contained HTML page from stored data, which loads nothing and runs no script.

The templates contain text and layout. This module and `sections` compute what the templates show.
"""

import base64
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.compute as pc

from pipeline.commit import Partition
from pipeline.config import InputUris
from pipeline.report import charts, sections
from pipeline.report.gallery import read_gallery
from pipeline.statistics import ClassStatistics, Comparison
from pipeline.text import escape_unprintable, format_number, format_percent, format_score, pluralize


def render_report(
    partition: Partition,
    record: Mapping[str, Any],
    statistics: ClassStatistics,
    comparisons: Sequence[Comparison] = (),
) -> bytes:
    """Returns the report of a partition and a run, an HTML page.

    Args:
        partition: the partition of the report.
        record: the record of the run.
        statistics: class statistics of all labels of the partition.
        comparisons: comparisons of other label sets (a) with labels of this partition (b).

    Raises:
        StorageError: the partition cannot be read.
    """
    manifest = partition.manifest.read(("rows", "errors", "error", "damage", "deleted", "unmatched_targets"))
    totals = {
        name: pc.sum(manifest[name]).as_py() or 0 for name in ("errors", "deleted", "unmatched_targets")
    }
    totals["shards"] = pc.count(manifest["rows"]).as_py()
    topk = record.get("config", {}).get("output", {}).get("topk", 5)
    images = read_gallery(partition.storage, partition.uri)
    # The id of each section, its title, and the values for its template. None leaves the section out.
    contents = [
        ("classes", "Classes and confidence", sections.classes(partition.labels, statistics, topk)),
        ("gallery", "Example images", sections.gallery(images, statistics)),
        ("accuracy", "Accuracy against targets", sections.accuracy(partition.labels, statistics)),
        *(
            (f"comparison-{i}", f"Comparison with {sections.reference_name(each)}", sections.comparison(each))
            for i, each in enumerate(comparisons)
        ),
        ("failures", "Failures", sections.failures(partition, manifest)),
        ("throughput", "Throughput", sections.throughput(record)),
        ("run", "Run details", {}),
    ]
    page: str = _template().render(
        partition=partition,
        record=record,
        input=InputUris.of_record(record),
        stats=statistics,
        topk=topk,
        totals=totals,
        sections=[
            {"id": section_id, "title": title, **values}
            for section_id, title, values in contents
            if values is not None
        ],
    )
    return page.encode()


@functools.cache  # compiling the templates takes longer than labeling a small shard
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        finalize=_escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    formats = {"text": str, "number": format_number, "percent": format_percent, "score": format_score}
    functions = (charts.axis_ticks, charts.max_value, charts.text_width, charts.truncate_label, pluralize)
    environment.globals.update(formats, zip=zip, score_bins=charts.score_bins)
    environment.filters.update(
        formats,
        **{each.__name__: each for each in functions},
        base64=lambda data: base64.b64encode(data).decode(),
    )
    return environment.get_template("report.html")


def _escape(value: Any) -> Any:
    """Returns a value as text with escaped unprintable characters; Jinja escapes HTML."""
    return value if hasattr(value, "__html__") else escape_unprintable(str(value))
