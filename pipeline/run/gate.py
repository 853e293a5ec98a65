"""The gate: a run's labels compared with those of the run before it, and held to the configured limits."""

from __future__ import annotations

from typing import Any

from pipeline.commit import Partition
from pipeline.compare import Succession
from pipeline.config import Config
from pipeline.statistics import Comparison, Limits


def limits(config: Config) -> Limits:
    """The limits of the configured gate."""
    return Limits(**config.gate.model_dump())


def judge(
    partition: Partition, limits: Limits, runs: Succession, previous: Comparison | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Holds a comparison of two runs to the limits.

    Args:
        partition: that the runs labeled for.
        limits: of the gate.
        runs: the run and the one before it.
        previous: their comparison; None where there is nothing to compare.

    Returns:
        the comparison's totals, and the broken limits in words. Where nothing is new, the judgment of the
        last run that labeled something still holds.
    """
    drift = None if previous is None else previous.totals
    if not runs.now and runs.before:
        drift = (partition.record(runs.before[-1]) or {}).get("drift")
    return drift, limits.broken(drift) if drift else []


def judge_again(
    partition: Partition, limits: Limits, runs: Succession
) -> tuple[dict[str, Any] | None, list[str]]:
    """As `judge`, for a run that labeled nothing itself."""
    previous = runs.compared(partition, runs.fold()[1]) if runs.now else None
    return judge(partition, limits, runs, previous)
