"""The sections of the page: classes, gallery, accuracy, comparisons, throughput and run details."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.classify import HIGHEST_CONFIDENCE
from pipeline.report.elements import (
    BarChart,
    Chart,
    Histogram,
    MatrixChart,
    ReliabilityDiagram,
    ReportSection,
)
from pipeline.report.gallery import GalleryItem
from pipeline.statistics import (
    Calibration,
    ClassStatistics,
    Comparison,
    StageSummary,
    class_table,
    format_class_row,
    is_long_enough,
    predicted_classes,
)
from pipeline.text import format_number, format_percent, format_score, pluralize

# Maximum numbers of shown items.
MAX_BARS = 20
MAX_TABLE_CLASSES = 50
MAX_PAIRS = 12
MAX_MATRIX_CLASSES = 15
MAX_CHANGED_CLASSES = 15
#: Classes with images. A class takes some kilobytes.
MAX_GALLERY_CLASSES = 20
_SHOWN_BINS = 20


def classes(labels: Sequence[str], stats: ClassStatistics, topk: int) -> ReportSection:
    """Returns the section about the predicted classes and their scores."""
    rows = predicted_classes(class_table(stats, labels, topk))
    note = f"Predicted classes: {len(rows):,} of {len(labels):,}."
    section = ReportSection("classes", "Classes and confidence", [note])
    if not rows:
        return section
    shown = rows[:MAX_BARS]
    names, counts = [row["label"] for row in shown], [row["count"] for row in shown]
    columns = ["Class", "Images", "Fraction", "Mean score", "p05", "p50", "p95"]
    if stats.has_targets:
        columns += ["Precision", "Recall", "F1"]
    limit_note = f"The table has the first {MAX_TABLE_CLASSES}. The file class_stats.parquet has all classes."
    section.charts.append(
        Chart(
            "Images by class" if len(shown) == len(rows) else f"The {len(shown)} most frequent classes",
            columns,
            [[row["label"], *format_class_row(row)] for row in rows[:MAX_TABLE_CLASSES]],
            BarChart(names, [("images", counts)], "images", format_number),
            note=limit_note if len(rows) > MAX_TABLE_CLASSES else "",
        )
    )
    all_images, correct = (
        counts.reshape(_SHOWN_BINS, -1).sum(axis=1).tolist()
        for counts in (stats.score_histogram.sum(axis=0), stats.calibration[1])
    )
    series, headings = [("all images", all_images)], ["Score", "Images"]
    if any(correct):
        series.append(("correct, of images with a target", correct))
        headings.append("Correct")
    confident = format_percent(sum(all_images[-_SHOWN_BINS // 10 :]) / max(1, sum(all_images)))
    section.charts.append(
        Chart(
            "Images by score",
            headings,
            bin_rows(*([format_number(value) for value in values] for _, values in series), digits=2),
            Histogram(series, format_number),
            note="The score is the softmax probability of the predicted class. "
            f"{confident} of the images have a score of 0.9 or higher.",
        )
    )
    return section


def bin_rows(*columns: Sequence[str], digits: int = 1) -> list[list[str]]:
    """Returns rows of a table by score: the bin, and the bin's value in each column."""
    edges = [f"{edge:.{digits}f}" for edge in np.linspace(0, 1, len(columns[0]) + 1)]
    bins = [f"{low} to {high}" for low, high in pairwise(edges)]
    return [list(row) for row in zip(bins, *columns, strict=True)]


def gallery(items: Iterable[GalleryItem], stats: ClassStatistics) -> ReportSection | None:
    """Returns the section with images of the most frequent classes; None without a gallery."""
    by_class: dict[int, list[GalleryItem]] = {}
    for item in items:
        by_class.setdefault(item.label_id, []).append(item)
    if not by_class:
        return None
    by_count = sorted(by_class, key=lambda label_id: (-int(stats.count[label_id]), label_id))
    shown = [by_class[label_id] for label_id in by_count[:MAX_GALLERY_CLASSES]]
    section = ReportSection("gallery", "Example images")
    section.gallery = [
        (
            class_items[0].label,
            [item for item in class_items if item.selection == HIGHEST_CONFIDENCE],
            [item for item in class_items if item.selection != HIGHEST_CONFIDENCE],
        )
        for class_items in shown
    ]
    note = "For each class: the images with the highest and the lowest confidence, with score and key."
    if len(by_class) > len(shown):
        note += f" The {len(shown)} most frequent classes are shown. The file gallery.parquet has more."
    section.notes.append(note)
    return section


def accuracy(labels: Sequence[str], stats: ClassStatistics, topk: int) -> ReportSection | None:
    """Returns the section about accuracy, calibration and confusion; None without targets."""
    if not stats.has_targets:
        return None
    section = ReportSection("accuracy", "Accuracy against targets")
    targets = pluralize(int(stats.support.sum()), "image")
    section.facts["Top-1 accuracy"] = f"{format_percent(stats.top1_accuracy())} of {targets} with a target"
    if (top5 := stats.top5_accuracy(topk)) is not None:
        section.facts["Top-5 accuracy"] = format_percent(top5)
    calibration = Calibration.from_statistics(stats)
    section.facts["Expected calibration error"] = f"{calibration.ece:.4f}"
    if never_predicted := np.count_nonzero((stats.support > 0) & (stats.count == 0)):
        target_classes = np.count_nonzero(stats.support)
        section.facts["Target classes never predicted"] = f"{never_predicted:,} of {target_classes:,}"
    counts, accuracies = calibration.counts.tolist(), calibration.accuracy.tolist()
    confidences = calibration.confidence.tolist()
    section.charts.append(
        Chart(
            "Accuracy by score",
            ["Score", "Images", "Accuracy", "Mean score"],
            bin_rows(
                [*map(format_number, counts)],
                [*map(format_percent, accuracies)],
                [*map(format_score, confidences)],
            ),
            ReliabilityDiagram(accuracies, confidences),
            f"Reliability diagram. The expected calibration error is {calibration.ece:.4f}.",
            "The bars of a calibrated model end at the dashed line: of labels with a score of 0.8, 80% are "
            "correct.",
        )
    )
    pairs = stats.confusion.most_common(MAX_PAIRS)
    if not pairs:
        section.notes.append("The label of every image equals its target.")
        return section
    section.charts.append(_confusion_matrix(labels, stats))
    rows = [
        [
            labels[target],
            labels[predicted],
            format_number(count),
            format_percent(count / max(1, int(stats.support[target]))),
        ]
        for predicted, target, count in pairs
    ]
    columns = ["Target", "Label", "Images", "Fraction of target"]
    section.charts.append(Chart("Most confused pairs", columns, rows, text_columns=2))
    if note := stats.confusion.limit_note:
        section.notes.append(note)
    return section


def _confusion_matrix(labels: Sequence[str], stats: ClassStatistics) -> Chart:
    chosen = _most_confused_classes(stats)
    position = {label_id: i for i, label_id in enumerate(chosen)}
    cells = np.diag(stats.true_positives[chosen])
    predicted, target, counts = stats.confusion.to_arrays()
    inside = np.isin(predicted, chosen) & np.isin(target, chosen)
    columns = (values[inside].tolist() for values in (predicted, target, counts))
    for predicted_id, target_id, count in zip(*columns, strict=True):
        cells[position[target_id], position[predicted_id]] = count
    names = [labels[label_id] for label_id in chosen]
    is_complete = len(chosen) == np.count_nonzero(stats.count | stats.support)
    predicted_id, target_id, count = stats.confusion.most_common(1)[0]
    times = pluralize(count, "time")
    return Chart(
        "Confusion matrix" if is_complete else f"Confusion matrix of the {len(chosen)} most confused classes",
        ["Target", *names],
        [[name, *map(format_number, row)] for name, row in zip(names, cells.tolist(), strict=True)],
        MatrixChart(names, (cells / np.maximum(1, stats.support[chosen])[:, None]).tolist()),
        "Targets are in rows, labels are in columns. The most confused pair is the target "
        f"{labels[target_id]} with the label {labels[predicted_id]}, {times}.",
        "A darker cell is a larger fraction of the row's target. The scale is the fraction's square root.",
    )


def _most_confused_classes(stats: ClassStatistics) -> list[int]:
    """Returns all classes that occur if they are few; otherwise those of the most confused pairs, by id."""
    occurring: list[int] = np.flatnonzero(stats.count | stats.support).tolist()
    if len(occurring) <= MAX_MATRIX_CLASSES:
        return occurring
    chosen: set[int] = set()
    for predicted, target, _ in stats.confusion.most_common(MAX_MATRIX_CLASSES**2):
        if len(chosen | {predicted, target}) <= MAX_MATRIX_CLASSES:
            chosen |= {predicted, target}
    return sorted(chosen)


def comparison(compared: Comparison, number_in_page: int) -> ReportSection:
    """Returns the section about drift from, and agreement with, another label set.

    The reference is label set a of the comparison. The current labels, those of the page, are label set b.
    """
    agreement, labels = compared.agreement, compared.drift.classes.labels
    section = ReportSection(f"comparison-{number_in_page}", f"Comparison with {_reference_name(compared)}")
    all_labels, of_run = "all labels", "labels of that run that no later run replaced"
    section.facts["Reference labels"] = f"{compared.a.name} ({of_run if compared.a.run else all_labels})"
    section.facts["Current labels"] = all_labels if compared.b.run is None else "labels of this run"
    section.facts |= compared.summary("in the reference", "in the current labels")
    drift, chosen = compared.drift, compared.drift.most_changed(MAX_CHANGED_CLASSES)
    names, psi = [labels[i] for i in chosen], map("{:.4f}".format, drift.psi_by_class[chosen])
    current, reference = drift.fraction_b[chosen].tolist(), drift.fraction_a[chosen].tolist()
    counts = (map(format_number, counts[chosen]) for counts in (drift.count_b, drift.count_a))
    fractions = map(format_percent, current), map(format_percent, reference)
    current_scores, reference_scores = (
        (histograms.sum(axis=0) / histograms.sum()).tolist()
        for histograms in (drift.scores_b, drift.scores_a)
    )
    section.charts = [
        Chart(
            "Classes whose fraction changed most",
            [
                "Class",
                "Images, current",
                "Images, reference",
                "Fraction, current",
                "Fraction, reference",
                "PSI",
            ],
            [*zip(names, *counts, *fractions, psi, strict=True)],
            BarChart(
                names,
                [("current", current), ("reference", reference)],
                "fraction of the images",
                "{:.1%}".format,
            ),
        ),
        Chart(
            "Score distribution",
            ["Score", "Fraction, current", "Fraction, reference"],
            bin_rows([*map(format_percent, current_scores)], [*map(format_percent, reference_scores)]),
            Histogram([("current", current_scores), ("reference", reference_scores)], "{:.0%}".format),
            f"The population stability index is {drift.score_psi:.4f}.",
        ),
    ]
    if agreement is not None and (pairs := agreement.disagreements.most_common(MAX_PAIRS)):
        rows = [
            [labels[b], labels[a], format_number(count), format_percent(count / agreement.compared)]
            for a, b, count in pairs
        ]
        columns = ["Current label", "Reference label", "Images", "Fraction of compared"]
        section.charts.append(Chart("Most frequent disagreements", columns, rows, text_columns=2))
    return section


def _reference_name(compared: Comparison) -> str:
    """Returns the name of the reference label set, for a heading."""
    a, b = compared.a, compared.b
    if a.uri != b.uri:
        return a.folder if a.run is None else f"{a.folder}, run {a.run}"
    if a.run is None:
        return "all labels"
    return f"run {a.run}" if b.run is None else "the previous run"


def throughput(record: Mapping[str, Any]) -> ReportSection | None:
    """Returns the section about a run's speed and bottleneck; None if the run processed nothing."""
    stages = {name: StageSummary(**values) for name, values in (record.get("stages") or {}).items()}
    if not stages:
        return None
    facts = {"Bottleneck": record.get("bound_by"), "Decoder": record.get("decoder")}
    if record.get("gpu_utilization") is not None:
        facts["GPU utilization"] = format_percent(record["gpu_utilization"])
    section = ReportSection(
        "throughput", "Throughput", facts={name: str(value) for name, value in facts.items() if value}
    )
    fractions_busy = [stage.fraction_busy for stage in stages.values()]
    timings = sorted(record.get("timings", {}).items(), key=lambda item: item[1])
    events = [[name.replace("_", " "), f"{seconds:,.1f}"] for name, seconds in timings]
    section.charts = [
        Chart(
            "Utilization of each stage's workers",
            ["Stage", "Images", "Busy, s", "Waiting, s", "Workers", "Output, MB", "Utilization"],
            [
                [
                    *(name, format_number(stage.images), f"{stage.busy_s:,.1f}", f"{stage.wait_s:,.1f}"),
                    *(f"{stage.workers:g}", f"{stage.bytes / 1e6:,.1f}", format_percent(stage.fraction_busy)),
                ]
                for name, stage in stages.items()
            ],
            BarChart(list(stages), [("busy", fractions_busy)], "fraction of time busy", "{:.0%}".format),
            note="The other stages wait for the busiest stage."
            if is_long_enough(stages)
            else "The run was too short to find the bottleneck: most of its input was read before the first "
            "measurement.",
        ),
        Chart("Seconds since the start of the run", ["Event", "Seconds"], events),
    ]
    return section


def run(record: Mapping[str, Any]) -> ReportSection:
    """Returns the section about the run's counts and software versions."""
    counts = [[name.replace("_", " "), f"{value:,}"] for name, value in record.get("counts", {}).items()]
    versions = [[name, str(value)] for name, value in record.get("versions", {}).items()]
    note = f"The file runs/{record.get('run')}.json has the complete configuration."
    section = ReportSection("run", "Run details", [note])
    section.charts.append(Chart("Counts of this run", ["Name", "Count"], counts))
    if ignored := record.get("ignored"):
        rows = [[reason, extension, f"{count:,}"] for reason, extension, count in ignored[:MAX_PAIRS]]
        columns = ["Reason", "Extension", "Objects"]
        section.charts.append(Chart("Ignored objects of the input", columns, rows, text_columns=2))
    if unmatched := record.get("unmatched_targets"):
        rows = [[each["cause"], f"{each['count']:,}"] for each in unmatched[:MAX_PAIRS]]
        section.charts.append(Chart("Unmatched targets of this run", ["Label", "Images"], rows))
    section.charts.append(Chart("Software versions", ["Package", "Version"], versions))
    return section
