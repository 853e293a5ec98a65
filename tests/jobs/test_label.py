"""Tests of the progress output of `label`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from jobs.label import Estimator, describe_progress
from pipeline.commit import Progress


def test_rate_and_remaining_time_are_estimated_from_first_results() -> None:
    now = [100.0]
    estimator = Estimator(clock=lambda: now[0])

    def estimate(images: int, fraction: float) -> str:
        return estimator.estimate(Progress(images, 2, 0, fraction))

    assert estimate(0, 0.0) == ""
    now[0] += 60  # start-up
    assert estimate(1000, 0.1) == ""
    now[0] += 4
    assert estimate(1400, 0.14) == ""
    now[0] += 4
    assert estimate(1800, 0.2) == ", 100.0 images/s, remaining 0:01:04"
    now[0] += 64
    assert estimate(9000, 1.0) == ", 111.1 images/s, remaining 0:00:00"


def test_progress_is_described_with_total_and_rate_if_known() -> None:
    unknown: Any = SimpleNamespace(images=None, shards=[None, None])
    known: Any = SimpleNamespace(images=9000, shards=[None, None])
    progress = Progress(1800, 1, 0, 0.2)
    assert describe_progress(progress, unknown, "") == "0 of 2 shards, 1,800 images, 1 error"
    described = describe_progress(progress, known, ", 100.0 images/s")
    assert described == "0 of 2 shards, 1,800 of 9,000 images, 1 error, 100.0 images/s"
