"""The sections of the page: classes, gallery, accuracy, comparisons, failures, throughput and run details."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.classify import HIGHEST_CONFIDENCE
from pipeline.commit import Partition
from pipeline.predictions import read_predictions
from pipeline.report.elements import (
    BarChart,
    Chart,
    Histogram,
    MatrixChart,
    ReliabilityDiagram,
    ReportSection,
)
from pipeline.statistics import (
    Calibration,
    ClassStatistics,
    Comparison,
    ErrorCauses,
    StageSummary,
    class_table,
    format_class_row,
    is_long_enough,
    predicted_classes,
)
from pipeline.storage import StorageError
from pipeline.text import format_number, format_percent, format_score, pluralize

# Maximum numbers of shown items.
MAX_BARS = 20
MAX_TABLE_CLASSES = 50
MAX_PAIRS = 12
MAX_MATRIX_CLASSES = 15
MAX_CHANGED_CLASSES = 15
#: Classes with images. A class takes some kilobytes.
MAX_GALLERY_CLASSES = 20
MAX_UNREADABLE_SHARDS = 20
#: Prediction files that are read for the causes of errors. Reading takes some seconds.
MAX_FILES = 500
_READER_THREADS = 16
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


def gallery(rows: pa.Table, stats: ClassStatistics) -> ReportSection | None:
    """Returns the section with images of the most frequent classes; None without a gallery."""
    label_ids = rows["label_id"].unique().to_pylist()
    if not label_ids:
        return None
    shown = sorted(label_ids, key=lambda i: (-int(stats.count[i]), i))[:MAX_GALLERY_CLASSES]
    note = "For each class: the images with the highest and the lowest confidence, with score and key."
    if len(label_ids) > len(shown):
        note += f" The {len(shown)} most frequent classes are shown. The file gallery.parquet has more."
    section = ReportSection("gallery", "Example images", [note])
    for label_id in shown:
        items = rows.filter(pc.equal(rows["label_id"], label_id)).to_pylist()
        highest = [item for item in items if item["selection"] == HIGHEST_CONFIDENCE]
        lowest = [item for item in items if item["selection"] != HIGHEST_CONFIDENCE]
        section.gallery.append((items[0]["label"], highest, lowest))
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
    rows = [(labels[target], labels[label], n, int(stats.support[target])) for label, target, n in pairs]
    section.charts.append(_pair_table("Most confused pairs", ["Target", "Label"], "target", rows))
    if note := stats.confusion.limit_note:
        section.notes.append(note)
    return section


def _confusion_matrix(labels: Sequence[str], stats: ClassStatistics) -> Chart:
    chosen = _most_confused_classes(stats)
    cells = np.diag(stats.true_positives[chosen])
    predicted, target, counts = stats.confusion.to_arrays()
    inside = np.isin(predicted, chosen) & np.isin(target, chosen)
    rows, columns = (np.searchsorted(chosen, ids[inside]) for ids in (target, predicted))
    cells[rows, columns] = counts[inside]
    names = [labels[label_id] for label_id in chosen]
    is_complete = len(chosen) == np.count_nonzero(stats.count | stats.support)
    predicted_id, target_id, count = stats.confusion.most_common(1)[0]
    return Chart(
        "Confusion matrix" if is_complete else f"Confusion matrix of the {len(chosen)} most confused classes",
        ["Target", *names],
        [[name, *map(format_number, row)] for name, row in zip(names, cells.tolist(), strict=True)],
        MatrixChart(names, (cells / np.maximum(1, stats.support[chosen])[:, None]).tolist()),
        "Targets are in rows, labels are in columns. The most confused pair is the target "
        f"{labels[target_id]} with the label {labels[predicted_id]}, {pluralize(count, 'time')}.",
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
    sides = {
        "current": (drift.count_b, drift.fraction_b, drift.scores_b),
        "reference": (drift.count_a, drift.fraction_a, drift.scores_a),
    }
    counts = [map(format_number, count[chosen]) for count, _, _ in sides.values()]
    fractions = {side: fraction[chosen].tolist() for side, (_, fraction, _) in sides.items()}
    scores = {side: (each.sum(axis=0) / each.sum()).tolist() for side, (_, _, each) in sides.items()}
    percents = [map(format_percent, values) for values in fractions.values()]
    section.charts = [
        Chart(
            "Classes whose fraction changed most",
            ["Class", *(f"{name}, {side}" for name in ("Images", "Fraction") for side in sides), "PSI"],
            [*zip(names, *counts, *percents, psi, strict=True)],
            BarChart(names, [*fractions.items()], "fraction of the images", "{:.1%}".format),
        ),
        Chart(
            "Score distribution",
            ["Score", *(f"Fraction, {side}" for side in sides)],
            bin_rows(*([*map(format_percent, values)] for values in scores.values())),
            Histogram([*scores.items()], "{:.0%}".format),
            f"The population stability index is {drift.score_psi:.4f}.",
        ),
    ]
    if agreement is not None and (pairs := agreement.disagreements.most_common(MAX_PAIRS)):
        rows = [(labels[b], labels[a], count, agreement.compared) for a, b, count in pairs]
        columns = ["Current label", "Reference label"]
        section.charts.append(_pair_table("Most frequent disagreements", columns, "compared", rows))
    return section


def _pair_table(
    title: str, names: Sequence[str], total_name: str, rows: Sequence[tuple[str, str, int, int]]
) -> Chart:
    """Returns a table of pairs of labels with their number of images, from rows (a, b, count, total)."""
    cells = [[a, b, f"{count:,}", format_percent(count / max(1, total))] for a, b, count, total in rows]
    return Chart(title, [*names, "Images", f"Fraction of {total_name}"], cells, text_columns=2)


def _reference_name(compared: Comparison) -> str:
    """Returns the name of the reference label set, for a heading."""
    a, b = compared.a, compared.b
    if a.uri != b.uri:
        folder = a.uri.rpartition("/")[2]
        return folder if a.run is None else f"{folder}, run {a.run}"
    if a.run is None:
        return "all labels"
    return f"run {a.run}" if b.run is None else "the previous run"


def failures(partition: Partition, manifest: pa.Table) -> ReportSection:
    """Returns the section about samples with errors and unreadable shards, of all runs.

    Reads the columns `errors`, `error` and `damage` of the manifest, and up to `MAX_FILES` prediction files.
    """
    damage = manifest["damage"].drop_null()
    unreadable = pa.chunked_array([*manifest["error"].drop_null().chunks, *damage.chunks], pa.string())
    errors = pc.sum(manifest["errors"]).as_py() or 0
    section = ReportSection("failures", "Failures")
    if not errors and not len(unreadable):
        section.notes.append("No failures: every sample of every shard is labeled.")
    if errors:
        shards = pc.sum(pc.greater(manifest["errors"], 0)).as_py()
        note = f"{pluralize(errors, 'sample')} in {pluralize(shards, 'shard')} could not be labeled"
        try:
            causes, missing_files = read_causes(partition, MAX_FILES)
        except StorageError as error:  # must not prevent the report of a run
            note += f". The causes could not be read: {error}"
        else:
            section.causes = causes.to_record()
            if shards > MAX_FILES or causes.count != errors:
                note += f". The causes cover {pluralize(causes.count, 'sample')}"
            if shards > MAX_FILES:
                note += f" of the {pluralize(MAX_FILES, 'shard')} with the most errors"
            if missing_files:
                note += f". {pluralize(missing_files, 'prediction file')} could not be found"
            note += ". By cause:"
        section.notes.append(note)
        files = f"{partition.uri}/predictions/**/*.parquet".replace("'", "''")
        section.query = f"SELECT shard, key, error FROM '{files}' WHERE error IS NOT NULL ORDER BY ALL"
    if len(unreadable):
        section.unreadable_shards = unreadable.slice(0, MAX_UNREADABLE_SHARDS).to_pylist()
        section.unreadable_note = f"{pluralize(len(unreadable), 'shard')} could not be read."
        if len(damage):
            section.unreadable_note += f" Of these, {len(damage):,} are labeled as far as they are readable."
        if len(unreadable) > MAX_UNREADABLE_SHARDS:
            section.unreadable_note += f" The first {MAX_UNREADABLE_SHARDS} are shown."
        section.unreadable_note += " The file manifest.parquet lists all:"
    return section


def read_causes(partition: Partition, max_files: int) -> tuple[ErrorCauses, int]:
    """Reads causes from the `max_files` prediction files with the most errors; raises `StorageError`.

    Returns the causes and the number of missing files.
    """
    rows = partition.manifest.labeled(["uri", "errors", "output"])
    with_errors = rows.filter(pc.greater(rows["errors"], 0))
    order = [("errors", "descending"), ("uri", "ascending")]
    most_errors = with_errors.take(pc.select_k_unstable(with_errors, max_files, order)).to_pylist()

    def read(row: Mapping[str, Any]) -> ErrorCauses | None:
        predictions = read_predictions(
            partition.storage, f"{partition.uri}/{row['output']}", ["key", "error"]
        )
        if predictions is None:
            return None
        causes = ErrorCauses()
        causes.add(row["uri"], predictions[1])
        return causes

    total, missing_files = ErrorCauses(), 0
    with ThreadPoolExecutor(_READER_THREADS, thread_name_prefix="causes") as pool:
        for causes in pool.map(read, most_errors):
            if causes is None:
                missing_files += 1
            else:
                total.merge(causes)
    return total, missing_files


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
        rows = [[each["cause"], f"{each['count']:,}"] for each in unmatched]
        section.charts.append(Chart("Unmatched targets of this run", ["Label", "Images"], rows))
    section.charts.append(Chart("Software versions", ["Package", "Version"], versions))
    return section
