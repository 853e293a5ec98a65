"""The gate: limits on failures and on drift, for a run, for its canary, and for a run without new labels."""

from collections import Counter

from pipeline.compare import RunPair
from pipeline.config import InputUris, Share
from pipeline.run.recording import RunContext
from pipeline.statistics import Comparison, limit_violations
from pipeline.storage import map_in_threads

_DRIFT_LIMITS = {"max_psi", "max_js", "max_score_psi"}


def read_earlier_failures(run: RunContext) -> None:
    """Reads the failures of the last run of the dataset, and of runs that were stopped since.

    A stopped run without new shards, which only repeated others, counts only if it exceeded a limit. Runs of
    other shares do not count.
    """
    partition, dataset = run.result.partition, run.result.job.config.input.inputs
    earlier = [each for each in partition.records() if each < run.result.run]
    # No limit: a thousand shares may have run since, or other datasets. Most often, few records are read.
    for record in map_in_threads(partition.record, reversed(earlier), threads=8):
        if "failures" not in record or InputUris.of_record(record) != dataset:
            continue
        if not run.result.plan.share.overlaps(Share.of_record(record)):
            continue
        if record["status"] not in ("running", "interrupted", "failed"):
            run.failures.last = Counter(record["failures"])
            break
        counts, states = Counter[str](record["failures"]), record["plan"]
        if states.get("new") or states.get("changed") or run.failures.exceeded_limits(counts):
            run.failures.stopped += counts


def check_gate_alone(run: RunContext) -> bool:
    """Checks the limits for the canary, or for a run that changed nothing; returns whether they pass."""
    result, runs = run.result, None
    if _drift_limits(run):
        runs = RunPair.find(result.partition, result.job.config.input.inputs, result.run)
    if runs is not None and not runs.current and result.plan.shards:
        runs = None  # the canary has no labels
    check_gate(run, runs, runs.fold_statistics()[1] if runs is not None and runs.current else None)
    return not (result.broken_limits or result.broken_failure_limits)


def check_gate(run: RunContext, runs: RunPair | None, previous: Comparison | None) -> None:
    """Compares the failures, and the drift from the previous run, if there is one, with the limits.

    If this run labeled nothing, the drift of the last run that labeled something still applies.
    """
    drift = None if previous is None else previous.totals
    if runs is not None and runs.previous is not None and not runs.current:
        drift = runs.partition.record(runs.previous).get("drift")
    result, min_images = run.result, run.result.job.config.gate.min_images
    result.broken_limits = limit_violations(drift, _drift_limits(run), min_images) if drift else []
    result.broken_failure_limits = run.failures.exceeded_limits(run.failures.judged())
    run.record.set(
        drift=drift, broken_limits=result.broken_limits, broken_failure_limits=result.broken_failure_limits
    )


def _drift_limits(run: RunContext) -> dict[str, float]:
    """Returns the limits on drift that are set."""
    return run.result.job.config.gate.model_dump(include=_DRIFT_LIMITS, exclude_none=True)
