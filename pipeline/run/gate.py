"""The gate: a run's labels compared with those of the run before it, and held to the configured limits."""

from __future__ import annotations

from typing import Any

from pipeline.compare import RunPair
from pipeline.config import Config
from pipeline.statistics import Comparison, Limits


def limits(config: Config) -> Limits:
    """The limits of the configured gate."""
    return Limits(**config.gate.model_dump())


def judge(
    limits: Limits, runs: RunPair, previous: Comparison | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Holds a comparison of two runs to the limits.

    Args:
        limits: of the gate.
        runs: the run and the one before it.
        previous: their comparison; None where there is nothing to compare.

    Returns:
        the comparison's totals, and the broken limits in words. Where nothing is new, the judgment of the
        last run that labeled something still holds.
    """
    drift = None if previous is None else previous.totals
    if not runs.current and runs.previous is not None:
        drift = (runs.partition.record(runs.previous) or {}).get("drift")
    return drift, limits.broken(drift) if drift else []


def judge_again(limits: Limits, runs: RunPair) -> tuple[dict[str, Any] | None, list[str]]:
    """As `judge`, for a run that labeled nothing itself."""
    previous = runs.compare()[1] if runs.current else None
    return judge(limits, runs, previous)
