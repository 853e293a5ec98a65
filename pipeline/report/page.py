"""The report for people: one self-contained HTML page that opens without a network, and runs no script.

It is made from what is stored: the record of a run, the class statistics, the manifest. So it can be made
again at any time, and against other labels.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pyarrow.compute as pc

from pipeline.report.causes import SHARD_COLUMNS, read_causes
from pipeline.report.parts import Chart, Section
from pipeline.storage import StorageError
from pipeline.text import percent, printable, score

if TYPE_CHECKING:
    from pipeline.commit import Partition
    from pipeline.report.gallery import Item
    from pipeline.statistics import ClassStatistics, Comparison


#: Shards that could not be read that are shown, at most; the manifest has the rest.
MOST_UNREADABLE = 20

#: Prediction files that are read for the causes of errors: some seconds' worth.
MOST_FILES = 500

#: Classes with samples to look at: some kilobytes each.
MOST_IN_GALLERY = 20


def make_report(
    partition: Partition,
    record: Mapping[str, Any],
    stats: ClassStatistics,
    *comparisons: Comparison | None,
    gallery: Iterable[Item] = (),
) -> str:
    """The page; whatever comes from data is escaped.

    Args:
        partition: whose labels it is of.
        record: of the run that it is of.
        stats: class statistics of all labels.
        comparisons: with other labels; None is passed over.
        gallery: samples to look at.

    Raises:
        StorageError: the manifest can't be read.
    """
    from pipeline.report import sections  # draws: Matplotlib takes a second to import

    manifest = partition.manifest.read(("rows", "errors", "error", "gone"))
    topk = record.get("config", {}).get("output", {}).get("topk", 5)
    found = [
        _failures(partition, manifest),
        sections.speed(record),
        sections.classes(partition, stats),
        sections.accuracy(partition, topk, stats) if stats.has_targets else None,
        *(sections.comparison(each, i) for i, each in enumerate(filter(None, comparisons))),
        _gallery(gallery, stats),
        _run(record),
    ]
    page = _environment().get_template("report.html")
    return page.render(
        model=partition.name.removeprefix("model="),
        facts=_facts(partition, record),
        cards=_cards(record, stats, manifest),
        sections=[section for section in found if section is not None],
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        score=score, printable=printable, base64=lambda data: base64.b64encode(data).decode()
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
        "Started": _moment(record.get("started_at")),
        "Ended": _moment(record.get("ended_at")),
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def _moment(text: str | None) -> str | None:
    return None if text is None else f"{text[:10]} {text[11:19]} UTC"


def _cards(record: Mapping[str, Any], stats: ClassStatistics, manifest: Any) -> list[tuple[str, str, str]]:
    """The figures that come first: name, value, and what it is of."""
    counts = record.get("counts", {})
    labelled = int(stats.count.sum())
    errors = pc.sum(manifest["errors"]).as_py() or 0
    gone, share = pc.sum(manifest["gone"]).as_py() or 0, errors / max(1, labelled + errors)
    shards = manifest.num_rows - manifest["rows"].null_count
    more = f", {gone:,} of them gone from the input" if gone else ""
    cards = [
        ("Labelled images", f"{labelled:,}", f"in all, of {_counted(shards, 'shard')}{more}"),
        ("Images that could not be labelled", f"{errors:,}", f"in all, {percent(share)}"),
    ]
    if counts:
        read = counts["shards"] - counts.get("unreadable_shards", 0)
        this = f"of {_counted(read, 'shard')}, {_counted(counts['errors'], 'error')}"
        cards.append(("Images of this run", f"{counts['images']:,}", this))
    if (rate := _rate(record)) is not None:
        cards.append(("Images a second", f"{rate:,.1f}", "of this run, from when Ray was ready"))
    if broken := record.get("broken_limits"):
        cards.append(("Drift from the run before", "over the limit", "; ".join(broken)))
    if stats.has_targets:
        of = f"of {int(stats.support.sum()):,} with a target"
        cards.append(("Top-1 accuracy", percent(stats.top1_accuracy()), of))
    return cards


def _rate(record: Mapping[str, Any]) -> float | None:
    seconds = record.get("seconds", {})
    if "last_result" not in seconds or "ray_ready" not in seconds:
        return None
    rate: float = record["counts"]["images"] / max(seconds["last_result"] - seconds["ray_ready"], 1e-9)
    return rate


def _failures(partition: Partition, manifest: Any) -> Section:
    """Why samples of any run have no label, and which shards couldn't be read."""
    failed = manifest["error"].drop_null()
    errors = pc.sum(manifest["errors"]).as_py() or 0
    section = Section("failures", "What failed")
    if not errors and not len(failed):
        section.notes.append("Nothing: every sample of every shard is labelled.")
        return section
    if errors:
        bad = pc.sum(pc.greater(manifest["errors"], 0)).as_py()
        section.notes.append(
            f"{_counted(errors, 'sample')} of {_counted(bad, 'shard')} could not be labelled"
            f"{_by_cause(section, partition, errors, bad)}"
        )
        source = f"{partition.uri}/predictions/**/*.parquet".replace("'", "''")
        section.query = (
            f"SELECT shard, key, error FROM '{source}' WHERE error IS NOT NULL ORDER BY shard, \"index\""
        )
        section.query_note = "This lists them all, with DuckDB:"
    if len(failed):
        section.unreadable = failed.slice(0, MOST_UNREADABLE).to_pylist()
        first = "" if len(section.unreadable) == len(failed) else f", the first {len(section.unreadable)}"
        shards = _counted(len(failed), "shard")
        section.unreadable_note = f"{shards} could not be read (manifest.parquet lists them{first}):"
    return section


def _by_cause(section: Section, partition: Partition, errors: int, bad: int) -> str:
    """Puts the causes into the section; returns what is to be said of them, the end of a sentence."""
    labelled = partition.manifest.labelled(SHARD_COLUMNS)
    try:
        causes, missing = read_causes(partition.storage, partition.uri, labelled, MOST_FILES)
    except StorageError as error:  # a run isn't to fail of it, whose labels are there
        return f". Their causes could not be read: {error}"
    section.causes = causes.to_record()
    note = ", by cause"
    if bad > MOST_FILES or causes.count != errors:
        note += f"; the causes are of {causes.count:,}"
    if bad > MOST_FILES:
        note += f", in the {_counted(MOST_FILES, 'shard')} with the most"
    if missing:
        note += f"; prediction files that are not there: {missing:,}"
    return f"{note}:"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _gallery(items: Iterable[Item], stats: ClassStatistics) -> Section | None:
    """The samples of the most frequent classes."""
    by_class: dict[int, list[Item]] = {}
    for item in items:
        by_class.setdefault(item.label_id, []).append(item)
    if not by_class:
        return None
    shown = sorted(by_class, key=lambda label_id: (-int(stats.count[label_id]), label_id))[:MOST_IN_GALLERY]
    section = Section("gallery", "Samples")
    section.gallery = [(by_class[label_id][0].label, by_class[label_id]) for label_id in shown]
    note = "Those that the model is most sure of, and least sure of, with their scores."
    more = f" Of the {len(shown)} most frequent classes; gallery.parquet has more." * (
        len(by_class) > len(shown)
    )
    section.notes.append(note + more)
    return section


def _run(record: Mapping[str, Any]) -> Section:
    versions = {name: str(value) for name, value in record.get("versions", {}).items()}
    counts = {name.replace("_", " "): f"{value:,}" for name, value in record.get("counts", {}).items()}
    section = Section("run", "The run")
    section.notes.append(f"runs/{record.get('run')}.json has its whole configuration.")
    section.tables.append(Chart("Counts of this run", "", ["What", "Number"], [*map(list, counts.items())]))
    section.tables.append(Chart("Versions", "", ["Package", "Version"], [*map(list, versions.items())]))
    return section
