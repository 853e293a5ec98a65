"""The report: one self-contained HTML page that opens without a network and runs no script.

It is made from what is stored: the record of a run, the class statistics, the manifest. So it can be made
again at any time.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit import Partition
from pipeline.report import sections
from pipeline.report.failures import failures
from pipeline.report.gallery import read_gallery
from pipeline.report.parts import largest, short, text_width, ticks
from pipeline.statistics import ClassStatistics, Comparison
from pipeline.storage import normalize_uri
from pipeline.text import escape_unprintable, format_percent, format_score, pluralize

#: Prediction files that are read for the causes of errors: some seconds' worth.
MAX_FILES = 500


def write_report(
    partition: Partition,
    record: Mapping[str, Any],
    statistics: ClassStatistics,
    comparisons: Sequence[Comparison] = (),
    output: str | None = None,
    max_files: int = MAX_FILES,
) -> str:
    """Writes the report about a partition and the run of a record; raises `StorageError`.

    Returns its URI: `report.html` in the partition where no other `output` is given. All text from data is
    escaped, and at most `max_files` prediction files are read.
    """
    manifest = partition.manifest.read(("rows", "errors", "error", "deleted"))
    topk = record.get("config", {}).get("output", {}).get("topk", 5)
    found = [
        failures(partition, manifest, max_files),
        sections.speed(record),
        sections.classes(partition.labels, statistics, topk),
        sections.accuracy(partition.labels, statistics, topk),
        *(sections.comparison(each, i) for i, each in enumerate(comparisons)),
        sections.gallery(read_gallery(partition.storage, partition.uri), statistics),
        sections.run(record),
    ]
    page = (
        _environment()
        .get_template("report.html")
        .render(
            model=partition.model,
            facts=_facts(partition, record),
            cards=_cards(record, statistics, manifest),
            sections=[section for section in found if section is not None],
        )
    )
    output = f"{partition.uri}/report.html" if output is None else normalize_uri(output)
    partition.storage.write(output, page.encode())
    return output


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        score=format_score,
        printable=escape_unprintable,
        largest=largest,
        short=short,
        text_width=text_width,
        ticks=ticks,
        base64=lambda data: base64.b64encode(data).decode(),
    )
    return environment


def _facts(partition: Partition, record: Mapping[str, Any]) -> dict[str, str]:
    config = record.get("config", {})
    model, section = config.get("model", {}), config.get("input", {})
    facts = {
        "Input": section.get("uri"),
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
    """The most important figures: name, value, and what they are of."""
    labeled = int(stats.count.sum())
    errors, deleted = (pc.sum(manifest[name]).as_py() or 0 for name in ("errors", "deleted"))
    share = format_percent(errors / max(1, labeled + errors))
    shards = pluralize(manifest.num_rows - manifest["rows"].null_count, "shard")
    more = f", {deleted:,} of them deleted from the input" if deleted else ""
    cards = [
        ("Labeled images", f"{labeled:,}", f"in all, of {shards}{more}"),
        ("Images that could not be labeled", f"{errors:,}", f"in all, {share}"),
    ]
    if counts := record.get("counts"):
        read = pluralize(counts["shards"] - counts.get("unreadable_shards", 0), "shard")
        of = f"of {read}, {pluralize(counts['errors'], 'error')}"
        cards.append(("Images of this run", f"{counts['images']:,}", of))
    seconds = record.get("timings", {})
    if "last_result" in seconds and "executor_ready" in seconds:
        rate = record["counts"]["images"] / max(seconds["last_result"] - seconds["executor_ready"], 1e-9)
        cards.append(("Images per second", f"{rate:,.1f}", "of this run, from when Ray was ready"))
    if broken := record.get("broken_limits"):
        cards.append(("Drift from the previous run", "over the limit", "; ".join(broken)))
    if stats.has_targets:
        of = f"of {int(stats.support.sum()):,} with a target"
        cards.append(("Top-1 accuracy", format_percent(stats.top1_accuracy()), of))
    return cards
