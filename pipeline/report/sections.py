"""The sections of the report that have charts: speed, classes, accuracy, and comparisons with other labels.

However many classes there are, a section shows the first of them, and says where the rest is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.report.charts import bars, histogram, matrix, reliability
from pipeline.report.parts import Chart, Section
from pipeline.statistics import Calibration, StageFigures, class_cells, is_telling, occurring
from pipeline.text import number, percent, score

if TYPE_CHECKING:
    from pipeline.commit import Partition
    from pipeline.statistics import Agreement, ClassStatistics, Comparison, Drift, PairCounts


#: What of everything is shown, at most.
MOST_BARS = 20

MOST_CLASSES = 50

MOST_CHANGED = 15

MOST_PAIRS = 12

MOST_IN_MATRIX = 15


_SHOWN_BINS = 20

_EVENTS = {
    "planned": "listing and plan done",
    "ray_ready": "Ray ready",
    "first_result": "first result",
    "first_commit": "first shard committed",
    "last_result": "last result",
    "published": "statistics and report written",
}


def speed(record: Mapping[str, Any]) -> Section | None:
    """How fast a run was, and what it waited for; None where nothing went through the stages."""
    stages = record.get("stages")
    if not stages:
        return None
    facts = {"Bound by": record.get("bound_by"), "Decoded by": record.get("decoder")}
    if record.get("gpu_utilisation") is not None:
        facts["GPU utilisation"] = percent(record["gpu_utilisation"])
    section = Section("speed", "How fast", facts={name: str(value) for name, value in facts.items() if value})
    title = "Share of their time that the stages' workers worked"
    busy = [figures["share_busy"] for figures in stages.values()]
    text = _listed(list(stages), busy, percent)
    section.charts.append(
        Chart(
            title,
            bars(title, text, list(stages), [("busy", busy)], "share busy", "{:.0%}".format),
            ["Stage", "Images", "Busy, s", "Waiting, s", "Workers", "MB passed on", "Busy"],
            [[name, *_stage_cells(figures)] for name, figures in stages.items()],
            "The stage that is busiest is the one that the others wait for."
            if is_telling({name: StageFigures(**figures) for name, figures in stages.items()})
            else "Of so short a run this tells little: its first images were read before it counts.",
        )
    )
    times = sorted(record.get("seconds", {}).items(), key=lambda item: item[1])
    events = [[_EVENTS.get(name, name), f"{seconds:,.1f}"] for name, seconds in times]
    section.tables.append(Chart("Seconds from the start of the run", "", ["Event", "Seconds"], events))
    return section


def _stage_cells(figures: Mapping[str, Any]) -> list[str]:
    return [
        number(figures["images"]),
        f"{figures['busy_s']:,.1f}",
        f"{figures['wait_s']:,.1f}",
        f"{figures['workers']:g}",
        f"{figures['bytes'] / 1e6:,.1f}",
        percent(figures["share_busy"]),
    ]


def classes(partition: Partition, stats: ClassStatistics) -> Section:
    """How often each class was given, and with which scores."""
    rows = occurring(partition.class_table)
    occur = f"Of {len(partition.labels):,} classes, {len(rows):,} occur in all labels."
    section = Section("classes", "Classes and confidence", [occur])
    if not rows:
        return section
    shown, listed = rows[:MOST_BARS], rows[:MOST_CLASSES]
    labels, values = [row["label"] for row in shown], [row["count"] for row in shown]
    title = "Images by class" if len(shown) == len(rows) else f"The {len(shown)} most frequent classes"
    columns = ["Class", "Images", "Share", "Mean score", "5 %", "50 %", "95 %"]
    if stats.has_targets:
        columns += ["Precision", "Recall", "F1"]
    section.charts.append(
        Chart(
            title,
            bars(title, _listed(labels, values, number), labels, [("images", values)], "images", number),
            columns,
            [[row["label"], *class_cells(row)] for row in listed],
            ""
            if len(listed) == len(rows)
            else f"The table has the first {MOST_CLASSES}; class_stats.parquet has all.",
        )
    )
    section.charts.append(_scores(stats))
    return section


def _scores(stats: ClassStatistics) -> Chart:
    whole, right = _coarse(stats.score_histogram.sum(axis=0)), _coarse(stats.calibration[1])
    edges = np.linspace(0, 1, _SHOWN_BINS + 1)
    series, columns = [("all", whole)], ["Score", "Images"]
    if right.any():
        series.append(("right, of those with a target", right))
        columns.append("Right")
    high = int(whole[edges[:-1] > 0.89].sum()) / max(1, int(whole.sum()))
    note = f"The score is the softmax of the class given: 0.9 or more for {percent(high)} of the images."
    rows = [
        [f"{edges[i]:.2f} to {edges[i + 1]:.2f}", *(number(values[i]) for _, values in series)]
        for i in range(_SHOWN_BINS)
    ]
    title = "Confidence: images by score"
    return Chart(title, histogram(title, note, edges, series, "score", number), columns, rows, note)


def _coarse(counts: np.ndarray) -> np.ndarray:
    coarse: np.ndarray = counts.reshape(_SHOWN_BINS, -1).sum(axis=1)
    return coarse


def accuracy(partition: Partition, topk: int, stats: ClassStatistics) -> Section:
    """How labels compare with targets: accuracy, calibration, confusion."""
    section = Section("accuracy", "Against targets")
    targets = int(stats.support.sum())
    section.facts["Top-1 accuracy"] = f"{percent(stats.top1_accuracy())} of {targets:,} images with a target"
    top5 = stats.top5_accuracy(topk)
    if top5 is not None:
        section.facts["Top-5 accuracy"] = percent(top5)
    found = Calibration.of(stats)
    section.facts["Expected calibration error"] = f"{found.ece:.4f}"
    section.charts.append(_calibration(found))
    if not stats.confusion.top(1):
        section.notes.append("No image is labelled with another class than its target.")
        return section
    section.charts.append(_matrix(partition.labels, stats))
    section.tables.append(_pairs(partition.labels, stats))
    section.notes += _undercounted(stats.confusion)
    return section


def _calibration(found: Calibration) -> Chart:
    title, edges = "Accuracy by score", np.linspace(0, 1, len(found.counts) + 1)
    columns = (found.counts.tolist(), found.accuracy.tolist(), found.confidence.tolist())
    rows = [
        [f"{edges[i]:.1f} to {edges[i + 1]:.1f}", number(count), percent(right), score(confidence)]
        for i, (count, right, confidence) in enumerate(zip(*columns, strict=True))
    ]
    text = f"Reliability diagram; the expected calibration error is {found.ece:.4f}."
    note = "A calibrated model's bars end at the dashed line: of labels with a score of 0.8, 80 % are right."
    drawing = reliability(title, text, edges, found.accuracy, found.confidence)
    return Chart(title, drawing, ["Score", "Images", "Accuracy", "Mean score"], rows, note)


def _pairs(labels: Sequence[str], stats: ClassStatistics) -> Chart:
    rows = [
        [labels[target], labels[given], number(count), percent(count / max(1, int(stats.support[target])))]
        for given, target, count in stats.confusion.top(MOST_PAIRS)
    ]
    columns = ["Target", "Labelled as", "Images", "Of the target's"]
    return Chart("Most confused pairs", "", columns, rows, names=2)


def _matrix(labels: Sequence[str], stats: ClassStatistics) -> Chart:
    chosen = _most_confused(stats)
    place = {c: i for i, c in enumerate(chosen)}
    cells = np.diag(stats.true_positives[chosen])
    given, target, counts = stats.confusion.arrays()
    inside = np.isin(given, chosen) & np.isin(target, chosen)
    for a, b, count in zip(
        given[inside].tolist(), target[inside].tolist(), counts[inside].tolist(), strict=True
    ):
        cells[place[b], place[a]] = count
    names = [labels[c] for c in chosen]
    is_whole = len(chosen) == np.count_nonzero(stats.count | stats.support)
    title = "Confusion matrix" if is_whole else f"Confusion matrix of the {len(chosen)} most confused classes"
    a, b, count = stats.confusion.top(1)[0]
    text = f"Targets in rows, labels in columns. {labels[b]} is labelled as {labels[a]} {count:,} times."
    drawing = matrix(title, text, names, cells / np.maximum(1, stats.support[chosen])[:, None])
    rows = [[name, *map(number, row)] for name, row in zip(names, cells.tolist(), strict=True)]
    note = "The fuller a cell, the larger its share of the row's targets (by the square root)."
    return Chart(title, drawing, ["Target", *names], rows, note)


def _most_confused(stats: ClassStatistics) -> list[int]:
    """The classes that occur, if they are few; else those of the most frequent pairs, by class id."""
    occur = np.flatnonzero(stats.count | stats.support)
    if len(occur) <= MOST_IN_MATRIX:
        return [int(c) for c in occur]
    chosen: dict[int, None] = {}
    for given, target, _ in stats.confusion.top(MOST_IN_MATRIX**2):
        if len(chosen.keys() | {given, target}) <= MOST_IN_MATRIX:
            chosen |= {given: None, target: None}
    return sorted(chosen)


def comparison(found: Comparison, place: int) -> Section:
    """How these labels differ from others: drift, and agreement where it was measured.

    Args:
        found: the other side first, this one second.
        place: the number of this comparison in the page.
    """
    drift, agreement, labels = found.drift, found.agreement, found.drift.classes.labels
    section = Section(f"against-{place}", f"Against {_other(found)}")
    there = "all labels" if found.a.run is None else "what that run labelled and still stands"
    section.facts["There"] = f"{there}: {found.a.name}"
    section.facts["Here"] = "all labels" if found.b.run is None else "what this run labelled"
    section.facts |= found.facts("there", "here")
    section.charts += [_changed(drift, place), _score_drift(drift, place)]
    if agreement is not None:
        _add_agreement(section, agreement, labels)
    return section


def _other(found: Comparison) -> str:
    """What these labels are compared with, for a heading."""
    a, b = found.a, found.b
    if a.uri == b.uri:
        if a.run is not None and b.run is not None:
            return "the previous run"
        return "all labels" if a.run is None else f"run {a.run}"
    return a.folder if a.run is None else f"{a.folder}, run {a.run}"


def _changed(drift: Drift, place: int) -> Chart:
    chosen, labels = drift.most_changed(MOST_CHANGED), drift.classes.labels
    names, parts = [labels[i] for i in chosen], drift.psi_parts
    here, there = ([float(side[i]) for i in chosen] for side in (drift.fraction_b, drift.fraction_a))
    some = list(zip(names, here, there, strict=True))[:5]
    text = "; ".join(f"{name}: {percent(b)} here, {percent(a)} there" for name, b, a in some)
    rows = [
        [name, number(drift.count_b[i]), number(drift.count_a[i]), percent(b), percent(a), f"{parts[i]:.4f}"]
        for i, name, b, a in zip(chosen, names, here, there, strict=True)
    ]
    columns = ["Class", "Images here", "Images there", "Share here", "Share there", "PSI"]
    title = "Classes whose share changed most"
    series = [("here", here), ("there", there)]
    drawing = bars(_told_apart(title, place), text, names, series, "share of the images", "{:.1%}".format)
    return Chart(title, drawing, columns, rows)


def _score_drift(drift: Drift, place: int) -> Chart:
    here, there = (counts.sum(axis=0) / counts.sum() for counts in (drift.scores_b, drift.scores_a))
    edges = np.linspace(0, 1, len(here) + 1)
    rows = [
        [f"{edges[i]:.1f} to {edges[i + 1]:.1f}", percent(here[i]), percent(there[i])]
        for i in range(len(here))
    ]
    title, text = "Scores, here and there", f"The population stability index is {drift.score_psi:.4f}."
    series = [("here", here), ("there", there)]
    drawing = histogram(_told_apart(title, place), text, edges, series, "score", "{:.0%}".format)
    return Chart(title, drawing, ["Score", "Share here", "Share there"], rows)


def _add_agreement(section: Section, agreement: Agreement, labels: Sequence[str]) -> None:
    rows = [
        [labels[b], labels[a], number(count), percent(count / agreement.compared)]
        for a, b, count in agreement.disagreements.top(MOST_PAIRS)
    ]
    if rows:
        columns = ["Here", "There", "Images", "Of those compared"]
        section.tables.append(Chart("Most frequent disagreements", "", columns, rows, names=2))
    section.notes += _undercounted(agreement.disagreements)


def _undercounted(pairs: PairCounts) -> list[str]:
    return [pairs.note] if pairs.note else []


def _told_apart(title: str, place: int) -> str:
    """The title of a chart that several comparisons have."""
    return title if place == 0 else f"{title} ({place + 1})"


def _listed(names: Sequence[str], values: Sequence[float], text: Callable[[float], str]) -> str:
    """A chart's values in words, as far as one listens."""
    some = [f"{name}: {text(value)}" for name, value in list(zip(names, values, strict=True))[:10]]
    return "; ".join(some) + ("" if len(names) <= 10 else f"; and {len(names) - 10} more")
