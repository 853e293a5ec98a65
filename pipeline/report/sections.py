"""The values that the sections of the page show. `templates/<section>.html` has the text and the layout."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.classify import HIGHEST_CONFIDENCE
from pipeline.commit import Partition
from pipeline.predictions import read_predictions
from pipeline.statistics import (
    Calibration,
    ClassStatistics,
    Comparison,
    ErrorCauses,
    class_table,
    predicted_classes,
)
from pipeline.storage import StorageError, map_in_threads

# Maximum numbers of shown items.
MAX_TABLE_CLASSES = 50
MAX_PAIRS = 12
MAX_MATRIX_CLASSES = 15
MAX_CHANGED_CLASSES = 15
#: Classes with images. A class takes some kilobytes.
MAX_GALLERY_CLASSES = 20
MAX_UNREADABLE_SHARDS = 20
#: Prediction files that are read for the causes of errors. Reading takes some seconds.
MAX_FILES = 500
_SHOWN_BINS = 20
#: Columns of the table of classes.
_CLASS_COLUMNS = [
    "label", "count", "fraction", "score_mean", "score_p05", "score_p50", "score_p95",
    "precision", "recall", "f1",
]  # fmt: skip


def classes(labels: Sequence[str], stats: ClassStatistics, topk: int) -> dict[str, Any]:
    """Returns the predicted classes, the most frequent first, and the images by score."""
    predicted = predicted_classes(class_table(stats, labels, topk)).select(_CLASS_COLUMNS)
    return {
        "predicted": len(predicted),
        "rows": [list(row.values()) for row in predicted.slice(0, MAX_TABLE_CLASSES).to_pylist()],
        "images": stats.score_histogram.sum(axis=0).reshape(_SHOWN_BINS, -1).sum(axis=1).tolist(),
        "correct": stats.calibration[1].reshape(_SHOWN_BINS, -1).sum(axis=1).tolist(),
    }


def gallery(rows: pa.Table, stats: ClassStatistics) -> dict[str, Any] | None:
    """Returns the images of the most frequent classes; None without a gallery."""
    label_ids = rows["label_id"].unique().to_pylist()
    if not label_ids:
        return None
    shown = []
    for label_id in sorted(label_ids, key=lambda i: (-int(stats.count[i]), i))[:MAX_GALLERY_CLASSES]:
        items = rows.filter(pc.equal(rows["label_id"], label_id)).to_pylist()
        highest = [item for item in items if item["selection"] == HIGHEST_CONFIDENCE]
        lowest = [item for item in items if item["selection"] != HIGHEST_CONFIDENCE]
        shown.append((items[0]["label"], highest, lowest))
    return {"shown": shown, "num_classes": len(label_ids)}


def accuracy(labels: Sequence[str], stats: ClassStatistics) -> dict[str, Any] | None:
    """Returns calibration, confused pairs and the confusion matrix; None without targets."""
    if not stats.has_targets:
        return None
    pairs = stats.confusion.most_common(MAX_PAIRS)
    return {
        "calibration": Calibration.from_statistics(stats),
        "target_classes": np.count_nonzero(stats.support),
        "never_predicted": np.count_nonzero((stats.support > 0) & (stats.count == 0)),
        "pairs": [(labels[b], labels[a], count, count / stats.support[b]) for a, b, count in pairs],
        "matrix": _confusion_matrix(labels, stats),
    }


def _confusion_matrix(labels: Sequence[str], stats: ClassStatistics) -> dict[str, Any]:
    chosen = _most_confused_classes(stats)
    cells = np.diag(stats.true_positives[chosen])
    predicted, target, counts = stats.confusion.to_arrays()
    inside = np.isin(predicted, chosen) & np.isin(target, chosen)
    rows, columns = (np.searchsorted(chosen, ids[inside]) for ids in (target, predicted))
    cells[rows, columns] = counts[inside]
    names = [labels[label_id] for label_id in chosen]
    return {
        "labels": names,
        "rows": [(name, *row) for name, row in zip(names, cells.tolist(), strict=True)],
        "fractions": (cells / np.maximum(1, stats.support[chosen])[:, None]).tolist(),
        "is_complete": len(chosen) == np.count_nonzero(stats.count | stats.support),
    }


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


def comparison(compared: Comparison) -> dict[str, Any]:
    """Returns the classes that changed most, the scores and the most frequent disagreements.

    The reference is label set a of the comparison. The current labels, those of the page, are label set b.
    """
    drift, agreement, labels = compared.drift, compared.agreement, compared.drift.classes.labels
    chosen = drift.most_changed(MAX_CHANGED_CLASSES)
    pairs = [] if agreement is None else agreement.disagreements.most_common(MAX_PAIRS)
    compared_images = 0 if agreement is None else agreement.compared
    return {
        "compared": compared,
        "labels": [labels[i] for i in chosen],
        "counts_a": drift.count_a[chosen].tolist(),
        "counts_b": drift.count_b[chosen].tolist(),
        "fractions_a": drift.fraction_a[chosen].tolist(),
        "fractions_b": drift.fraction_b[chosen].tolist(),
        "psi": drift.psi_by_class[chosen].tolist(),
        "scores_a": (drift.scores_a.sum(axis=0) / drift.scores_a.sum()).tolist(),
        "scores_b": (drift.scores_b.sum(axis=0) / drift.scores_b.sum()).tolist(),
        "disagreements": [(labels[b], labels[a], count, count / compared_images) for a, b, count in pairs],
    }


def reference_name(compared: Comparison) -> str:
    """Returns the name of the reference label set, for a heading."""
    a, b = compared.a, compared.b
    if a.uri != b.uri:
        folder = a.uri.rpartition("/")[2]
        return folder if a.run is None else f"{folder}, run {a.run}"
    if a.run is None:
        return "all labels"
    return f"run {a.run}" if b.run is None else "the previous run"


def failures(partition: Partition, manifest: pa.Table) -> dict[str, Any]:
    """Returns the causes of errors, and the errors of unreadable shards, of all runs.

    Reads the columns `errors`, `error` and `damage` of the manifest, and up to `MAX_FILES` prediction files.
    """
    causes, missing_files, problem = ErrorCauses(), 0, ""
    shards_with_errors = pc.sum(pc.greater(manifest["errors"], 0)).as_py() or 0
    if shards_with_errors:
        try:
            causes, missing_files = read_causes(partition, MAX_FILES)
        except StorageError as error:  # must not prevent the report of a run
            problem = str(error)
    damage = manifest["damage"].drop_null()
    unreadable = pa.chunked_array([*manifest["error"].drop_null().chunks, *damage.chunks], pa.string())
    return {
        "shards": shards_with_errors,
        "causes": causes,
        "missing_files": missing_files,
        "problem": problem,
        "max_files": MAX_FILES,
        "unreadable_shards": len(unreadable),
        "damaged_shards": len(damage),
        "shown": unreadable.slice(0, MAX_UNREADABLE_SHARDS).to_pylist(),
    }


def read_causes(partition: Partition, max_files: int) -> tuple[ErrorCauses, int]:
    """Reads causes from the `max_files` prediction files with the most errors; raises `StorageError`.

    Returns the causes and the number of missing files.
    """
    rows = partition.manifest.labeled(["uri", "errors", "output"])
    with_errors = rows.filter(pc.greater(rows["errors"], 0))
    order = [("errors", "descending"), ("uri", "ascending")]
    most_errors = with_errors.take(pc.select_k_unstable(with_errors, max_files, order)).to_pylist()

    def read(row: Mapping[str, Any]) -> tuple[str, pa.Table | None]:
        uri = f"{partition.uri}/{row['output']}"
        found = read_predictions(partition.storage, uri, ["key", "error"])
        return row["uri"], None if found is None else found[1]

    causes, missing_files = ErrorCauses(), 0
    for uri, predictions in map_in_threads(read, most_errors, threads=8):
        if predictions is None:
            missing_files += 1
        else:
            causes.add(uri, predictions)
    return causes, missing_files


def throughput(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the metrics of a run's stages; None if the run processed nothing."""
    columns = ("images", "busy_s", "wait_s", "workers", "bytes", "fraction_busy")
    stages = record.get("stages") or {}
    rows = [[stage, *(metrics[name] for name in columns)] for stage, metrics in stages.items()]
    return {"stages": rows} if rows else None
