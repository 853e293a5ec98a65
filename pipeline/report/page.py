"""The report: one self-contained HTML page from stored data, which loads nothing and runs no script."""

import base64
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit import Partition
from pipeline.config import InputUris
from pipeline.report import sections
from pipeline.report.elements import axis_ticks, max_value, text_width, truncate_label
from pipeline.report.gallery import read_gallery
from pipeline.statistics import ClassStatistics, Comparison
from pipeline.storage import normalize_uri
from pipeline.text import escape_unprintable, format_percent, format_score, pluralize


def write_report(
    partition: Partition,
    record: Mapping[str, Any],
    statistics: ClassStatistics,
    comparisons: Sequence[Comparison] = (),
    output: str | None = None,
) -> str:
    """Writes the report of a partition and a run; returns the report's URI.

    Args:
        partition: the partition of the report.
        record: the record of the run.
        statistics: class statistics of all labels of the partition.
        comparisons: comparisons of other label sets (a) with labels of this partition (b).
        output: path or URI of the page. If None, `report.html` in the partition.

    Raises:
        StorageError: the partition cannot be read, or the page cannot be written.
    """
    manifest = partition.manifest.read(("rows", "errors", "error", "damage", "deleted", "unmatched_targets"))
    topk = record.get("config", {}).get("output", {}).get("topk", 5)
    page_sections = [
        sections.classes(partition.labels, statistics, topk),
        sections.gallery(read_gallery(partition.storage, partition.uri), statistics),
        sections.accuracy(partition.labels, statistics, topk),
        *(sections.comparison(each, i) for i, each in enumerate(comparisons)),
        sections.failures(partition, manifest),
        sections.throughput(record),
        sections.run(record),
    ]
    page = _template().render(
        model=partition.model,
        facts=_facts(partition, record),
        cards=_cards(record, statistics, manifest),
        sections=[section for section in page_sections if section is not None],
    )
    output = f"{partition.uri}/report.html" if output is None else normalize_uri(output)
    partition.storage.write(output, page.encode())
    return output


@functools.cache  # compiling the templates takes longer than labeling a small shard
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    named = (axis_ticks, format_score, max_value, pluralize, text_width, truncate_label)
    environment.filters.update(
        {each.__name__: each for each in named},
        printable=escape_unprintable,
        base64=lambda data: base64.b64encode(data).decode(),
    )
    return environment.get_template("report.html")


def _facts(partition: Partition, record: Mapping[str, Any]) -> dict[str, str]:
    config = record.get("config", {})
    model = config.get("model", {})
    facts = {
        "Input": InputUris.of_record(record),
        "Checkpoint": model.get("path"),
        "Precision": model.get("precision"),
        "Output": partition.uri,
        "Fingerprint": record.get("fingerprint"),
        "Run": record.get("run"),
    }
    for name in ("started", "ended"):
        if time := record.get(f"{name}_at"):
            facts[name.capitalize()] = f"{time[:10]} {time[11:19]} UTC"
    return {name: str(value) for name, value in facts.items() if value is not None}


def _cards(
    record: Mapping[str, Any], stats: ClassStatistics, manifest: pa.Table
) -> list[tuple[str, str, str]]:
    """Returns the most important figures: name, value, and an explanation."""
    labeled = int(stats.count.sum())
    errors, deleted, unmatched = (
        pc.sum(manifest[name]).as_py() or 0 for name in ("errors", "deleted", "unmatched_targets")
    )
    error_rate = format_percent(errors / max(1, labeled + errors))
    shards = pluralize(manifest.num_rows - manifest["rows"].null_count, "shard")
    deleted_note = f"; {deleted:,} deleted from the input" if deleted else ""
    cards = [
        ("Labeled images", f"{labeled:,}", f"all runs, {shards}{deleted_note}"),
        ("Images with errors", f"{errors:,}", f"all runs, {error_rate} of the images"),
    ]
    if stats.has_targets:
        targets = f"of {pluralize(int(stats.support.sum()), 'image')} with a target"
        cards.append(("Top-1 accuracy", format_percent(stats.top1_accuracy()), targets))
    if unmatched:
        note = "all runs, not classes of the model; see input.target_map and input.labels"
        cards.append(("Unmatched targets", f"{unmatched:,}", note))
    if counts := record.get("counts"):
        read = pluralize(counts["shards"] - counts.get("unreadable_shards", 0), "shard")
        details = f"{read}, {pluralize(counts['errors'], 'error')}"
        cards.append(("Images in this run", f"{counts['images']:,}", details))
    rate = record.get("images_per_s")
    if rate is not None:
        cards.append(("Images per second", f"{rate:,.1f}", "in this run, from the first result to the last"))
    if broken := record.get("broken_failure_limits"):
        cards.append(("Failures of this run", "over the limit", "; ".join(broken)))
    if broken := record.get("broken_limits"):
        cards.append(("Drift from the previous run", "over the limit", "; ".join(broken)))
    return cards
