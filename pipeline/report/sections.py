"""The sections of the page: speed, classes, accuracy, comparisons with other label sets, samples, the run.

With many classes, a section shows the first ones and says where the others are.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.report.gallery import GalleryItem
from pipeline.report.parts import Bars, Chart, Histogram, Matrix, Reliability, Section
from pipeline.statistics import (
    Calibration,
    ClassStatistics,
    Comparison,
    StageSummary,
    class_table,
    format_class_row,
    is_long_enough,
    occurring_classes,
)
from pipeline.text import format_number, format_percent, format_score

#: What is shown at most.
MOST_BARS = 20
MOST_CLASSES = 50
MOST_PAIRS = 12
MOST_IN_MATRIX = 15
MOST_CHANGED = 15
#: Classes with images: some kilobytes each.
MOST_IN_GALLERY = 20
_SHOWN_BINS = 20


def speed(record: Mapping[str, Any]) -> Section | None:
    """How fast a run was, and which stage limited it; None where it processed nothing."""
    stages = {name: StageSummary(**figures) for name, figures in (record.get("stages") or {}).items()}
    if not stages:
        return None
    facts = {"Bound by": record.get("bound_by"), "Decoded by": record.get("decoder")}
    if record.get("gpu_utilization") is not None:
        facts["GPU utilization"] = format_percent(record["gpu_utilization"])
    section = Section("speed", "How fast", facts={name: str(value) for name, value in facts.items() if value})
    busy = [figures.share_busy for figures in stages.values()]
    times = sorted(record.get("timings", {}).items(), key=lambda item: item[1])
    events = [[name.replace("_", " "), f"{seconds:,.1f}"] for name, seconds in times]
    section.charts = [
        Chart(
            "Fraction of the time that the stages' workers were busy",
            ["Stage", "Images", "Busy, s", "Waiting, s", "Workers", "MB passed on", "Busy"],
            [
                [
                    *(name, format_number(each.images), f"{each.busy_s:,.1f}", f"{each.wait_s:,.1f}"),
                    *(f"{each.workers:g}", f"{each.bytes / 1e6:,.1f}", format_percent(each.share_busy)),
                ]
                for name, each in stages.items()
            ],
            Bars(list(stages), [("busy", busy)], "busy", "{:.0%}".format),
            note="The other stages wait for the busiest one."
            if is_long_enough(stages)
            else "The run was too short to tell: its first images were read before measuring started.",
        ),
        Chart("Seconds from the start of the run", ["Event", "Seconds"], events),
    ]
    return section


def classes(labels: Sequence[str], stats: ClassStatistics, topk: int) -> Section:
    """How often each class was given, and with which scores."""
    rows = occurring_classes(class_table(stats, labels, topk))
    note = f"Of {len(labels):,} classes, {len(rows):,} occur in all labels."
    section = Section("classes", "Classes and confidence", [note])
    if not rows:
        return section
    shown = rows[:MOST_BARS]
    names, values = [row["label"] for row in shown], [row["count"] for row in shown]
    columns = ["Class", "Images", "Share", "Mean score", "5 %", "50 %", "95 %"]
    if stats.has_targets:
        columns += ["Precision", "Recall", "F1"]
    more = f"The table has the first {MOST_CLASSES}; class_stats.parquet has all."
    section.charts.append(
        Chart(
            "Images by class" if len(shown) == len(rows) else f"The {len(shown)} most frequent classes",
            columns,
            [[row["label"], *format_class_row(row)] for row in rows[:MOST_CLASSES]],
            Bars(names, [("images", values)], "images", format_number),
            note=more if len(rows) > MOST_CLASSES else "",
        )
    )
    whole, right = (
        counts.reshape(_SHOWN_BINS, -1).sum(axis=1).tolist()
        for counts in (stats.score_histogram.sum(axis=0), stats.calibration[1])
    )
    series, headings = [("all", whole)], ["Score", "Images"]
    if any(right):
        series.append(("correct, of images with a target", right))
        headings.append("Correct")
    high = format_percent(sum(whole[-_SHOWN_BINS // 10 :]) / max(1, sum(whole)))
    section.charts.append(
        Chart(
            "Confidence: images by score",
            headings,
            bin_rows(*([format_number(value) for value in values] for _, values in series), digits=2),
            Histogram(series, format_number),
            note=f"The score is the softmax of the class given: {high} of the images have 0.9 or more.",
        )
    )
    return section


def bin_rows(*columns: Sequence[str], digits: int = 1) -> list[list[str]]:
    """Rows of a table by score: the bin, and its value in each column."""
    edges = [f"{edge:.{digits}f}" for edge in np.linspace(0, 1, len(columns[0]) + 1)]
    bins = [f"{low} to {high}" for low, high in pairwise(edges)]
    return [list(row) for row in zip(bins, *columns, strict=True)]


def accuracy(labels: Sequence[str], stats: ClassStatistics, topk: int) -> Section | None:
    """Labels compared with targets: accuracy, calibration, confusion; None without targets."""
    if not stats.has_targets:
        return None
    section = Section("accuracy", "Against targets")
    targets = int(stats.support.sum())
    section.facts["Top-1 accuracy"] = (
        f"{format_percent(stats.top1_accuracy())} of {targets:,} images with a target"
    )
    if (top5 := stats.top5_accuracy(topk)) is not None:
        section.facts["Top-5 accuracy"] = format_percent(top5)
    found = Calibration.from_statistics(stats)
    section.facts["Expected calibration error"] = f"{found.ece:.4f}"
    counts, right, confidence = found.counts.tolist(), found.accuracy.tolist(), found.confidence.tolist()
    section.charts.append(
        Chart(
            "Accuracy by score",
            ["Score", "Images", "Accuracy", "Mean score"],
            bin_rows(
                [*map(format_number, counts)], [*map(format_percent, right)], [*map(format_score, confidence)]
            ),
            Reliability(right, confidence),
            f"Reliability diagram; the expected calibration error is {found.ece:.4f}.",
            "A calibrated model's bars end at the dashed line: 80 % of labels with a score of 0.8 are right.",
        )
    )
    pairs = stats.confusion.most_common(MOST_PAIRS)
    if not pairs:
        section.notes.append("No image is labeled with another class than its target.")
        return section
    section.charts.append(_matrix(labels, stats))
    rows = [
        [
            labels[target],
            labels[given],
            format_number(count),
            format_percent(count / max(1, int(stats.support[target]))),
        ]
        for given, target, count in pairs
    ]
    columns = ["Target", "Labeled as", "Images", "Of the target's"]
    section.charts.append(Chart("Most confused pairs", columns, rows, names=2))
    if note := stats.confusion.limit_note:
        section.notes.append(note)
    return section


def _matrix(labels: Sequence[str], stats: ClassStatistics) -> Chart:
    chosen = _most_confused(stats)
    place = {label_id: i for i, label_id in enumerate(chosen)}
    cells = np.diag(stats.true_positives[chosen])
    given, target, counts = stats.confusion.to_arrays()
    inside = np.isin(given, chosen) & np.isin(target, chosen)
    for a, b, count in zip(*(values[inside].tolist() for values in (given, target, counts)), strict=True):
        cells[place[b], place[a]] = count
    names = [labels[label_id] for label_id in chosen]
    is_whole = len(chosen) == np.count_nonzero(stats.count | stats.support)
    a, b, count = stats.confusion.most_common(1)[0]
    return Chart(
        "Confusion matrix" if is_whole else f"Confusion matrix of the {len(chosen)} most confused classes",
        ["Target", *names],
        [[name, *map(format_number, row)] for name, row in zip(names, cells.tolist(), strict=True)],
        Matrix(names, (cells / np.maximum(1, stats.support[chosen])[:, None]).tolist()),
        f"Targets in rows, labels in columns. {labels[b]} is labeled as {labels[a]} {count:,} times.",
        "The darker a cell, the larger its share of the row's targets (by the square root).",
    )


def _most_confused(stats: ClassStatistics) -> list[int]:
    """The classes that occur, if they are few; else those of the most frequent pairs, by class id."""
    occur: list[int] = np.flatnonzero(stats.count | stats.support).tolist()
    if len(occur) <= MOST_IN_MATRIX:
        return occur
    chosen: set[int] = set()
    for given, target, _ in stats.confusion.most_common(MOST_IN_MATRIX**2):
        if len(chosen | {given, target}) <= MOST_IN_MATRIX:
            chosen |= {given, target}
    return sorted(chosen)


def comparison(found: Comparison, number_in_page: int) -> Section:
    """How the labels of the page, b of the comparison, differ from others: drift, and agreement."""
    agreement, labels = found.agreement, found.drift.classes.labels
    section = Section(f"against-{number_in_page}", f"Against {_other(found)}")
    there = "all labels" if found.a.run is None else "what that run labeled and no later run relabeled"
    section.facts["There"] = f"{there}: {found.a.name}"
    section.facts["Here"] = "all labels" if found.b.run is None else "what this run labeled"
    section.facts |= found.summary("there", "here")
    drift, chosen = found.drift, found.drift.most_changed(MOST_CHANGED)
    names, parts = [labels[i] for i in chosen], map("{:.4f}".format, drift.psi_by_class[chosen])
    here, there = drift.fraction_b[chosen].tolist(), drift.fraction_a[chosen].tolist()
    counts = (map(format_number, counts[chosen]) for counts in (drift.count_b, drift.count_a))
    scores, others = ((s.sum(axis=0) / s.sum()).tolist() for s in (drift.scores_b, drift.scores_a))
    section.charts = [
        Chart(
            "Classes whose share changed most",
            ["Class", "Images here", "Images there", "Share here", "Share there", "PSI"],
            [*zip(names, *counts, map(format_percent, here), map(format_percent, there), parts, strict=True)],
            Bars(names, [("here", here), ("there", there)], "share of the images", "{:.1%}".format),
        ),
        Chart(
            "Scores, here and there",
            ["Score", "Share here", "Share there"],
            bin_rows([*map(format_percent, scores)], [*map(format_percent, others)]),
            Histogram([("here", scores), ("there", others)], "{:.0%}".format),
            f"The population stability index is {drift.score_psi:.4f}.",
        ),
    ]
    if agreement is not None and (pairs := agreement.disagreements.most_common(MOST_PAIRS)):
        rows = [
            [labels[b], labels[a], format_number(count), format_percent(count / agreement.compared)]
            for a, b, count in pairs
        ]
        columns = ["Here", "There", "Images", "Of those compared"]
        section.charts.append(Chart("Most frequent disagreements", columns, rows, names=2))
    return section


def _other(found: Comparison) -> str:
    """What these labels are compared with, for a heading."""
    a, b = found.a, found.b
    if a.uri != b.uri:
        return a.folder if a.run is None else f"{a.folder}, run {a.run}"
    if a.run is None:
        return "all labels"
    return f"run {a.run}" if b.run is None else "the previous run"


def gallery(items: Iterable[GalleryItem], stats: ClassStatistics) -> Section | None:
    """Images of the most frequent classes; None where there is no gallery."""
    by_class: dict[int, list[GalleryItem]] = {}
    for item in items:
        by_class.setdefault(item.label_id, []).append(item)
    if not by_class:
        return None
    shown = sorted(by_class, key=lambda label_id: (-int(stats.count[label_id]), label_id))[:MOST_IN_GALLERY]
    section = Section("gallery", "Samples")
    section.gallery = [(by_class[label_id][0].label, by_class[label_id]) for label_id in shown]
    note = "Images with the highest and the lowest confidence, with their scores."
    if len(by_class) > len(shown):
        note += f" Of the {len(shown)} most frequent classes; gallery.parquet has more."
    section.notes.append(note)
    return section


def run(record: Mapping[str, Any]) -> Section:
    """The run's counts, and the versions of its software."""
    counts = [[name.replace("_", " "), f"{value:,}"] for name, value in record.get("counts", {}).items()]
    versions = [[name, str(value)] for name, value in record.get("versions", {}).items()]
    section = Section("run", "The run", [f"runs/{record.get('run')}.json has its whole configuration."])
    section.charts.append(Chart("Counts of this run", ["What", "Number"], counts))
    section.charts.append(Chart("Versions", ["Package", "Version"], versions))
    return section
