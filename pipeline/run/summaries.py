"""The end of a run: class statistics, gallery, report, and the judgment by the gate."""

import logging
from datetime import UTC, datetime

import numpy as np

from pipeline.classify import GALLERY_CLASSES
from pipeline.compare import RunPair
from pipeline.report import GALLERY_FILE, read_gallery, write_gallery, write_report
from pipeline.run.recording import RunContext
from pipeline.run.stored import write_class_table
from pipeline.statistics import ClassStatistics, Comparison, ComparisonLimits
from pipeline.storage import ABSENT, StorageError

logger = logging.getLogger("cvt_label")


def summarize(run: RunContext) -> None:
    """Writes class statistics, gallery and report, and holds the run to the limits of the gate."""
    runs, partition = _run_pair(run), run.result.partition
    statistics, previous = runs.fold_statistics()
    run.result.statistics = statistics
    write_class_table(partition, statistics, run.result.job.config.output.topk)
    run.note_counts()
    _judge(run, runs, previous)
    _update_gallery(run, statistics)
    so_far = {"timings": run.clock.seconds, "ended_at": datetime.now(UTC).isoformat()}
    values = run.record.values | so_far
    try:
        write_report(partition, values, statistics, [previous] if previous else [])
    except StorageError:
        raise
    except Exception:  # must not fail a run whose labels are written
        logger.exception("the report could not be drawn")


def judge_again(run: RunContext) -> None:
    """Holds what earlier runs labeled to the limits of the gate, where this run changed nothing."""
    if _limits(run).any_set:
        runs = _run_pair(run)
        _judge(run, runs, runs.fold_statistics()[1] if runs.current else None)


def has_unwanted_gallery(run: RunContext) -> bool:
    """Whether there is a gallery, and the configuration has since been set to none."""
    uri = f"{run.result.partition.uri}/{GALLERY_FILE}"
    return not run.result.job.config.report.gallery and run.result.job.storage.version(uri) != ABSENT


def _update_gallery(run: RunContext, statistics: ClassStatistics) -> None:
    """Writes `gallery.parquet` without shards that are deleted; it keeps the most frequent classes."""
    storage, uri = run.result.job.storage, run.result.partition.uri
    if not run.result.job.config.report.gallery:
        storage.delete(f"{uri}/{GALLERY_FILE}")
        return
    deleted = {*run.record.values["removed"], *run.result.rolled_back}
    frequent = np.argsort(-statistics.count, kind="stable")[:GALLERY_CLASSES].tolist()
    write_gallery(storage, uri, run.gallery.merge(read_gallery(storage, uri), deleted, set(frequent)))


def _limits(run: RunContext) -> ComparisonLimits:
    return ComparisonLimits(**run.result.job.config.gate.model_dump())


def _judge(run: RunContext, runs: RunPair, previous: Comparison | None) -> None:
    """Compares the drift since the previous run, if there is one, with the limits of the gate.

    Where nothing is new, the judgment of the last run that labeled something still holds.
    """
    drift = None if previous is None else previous.totals
    if not runs.current and runs.previous is not None:
        drift = (runs.partition.record(runs.previous) or {}).get("drift")
    broken = _limits(run).violations(drift) if drift else []
    run.result.broken_limits = broken
    run.record.note(drift=drift, broken_limits=broken)


def _run_pair(run: RunContext) -> RunPair:
    return RunPair.find(run.result.partition, run.result.job.config.input.uri, run.result.run)
