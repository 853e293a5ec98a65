"""The gate: a run's labels compared with those of the run before it, and held to the configured limits."""

from __future__ import annotations

from typing import Any

from pipeline.compare import RunPair
from pipeline.statistics import Comparison, Limits


def judge(
    limits: Limits, runs: RunPair, previous: Comparison | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Holds the comparison of a run with the previous one to the limits; None if there is nothing to compare.

    Returns:
        the comparison's totals, and the broken limits in words. Where nothing is new, the judgment of the
        last run that labeled something still holds.
    """
    drift = None if previous is None else previous.totals
    if not runs.current and runs.previous is not None:
        drift = (runs.partition.record(runs.previous) or {}).get("drift")
    return drift, limits.broken(drift) if drift else []
