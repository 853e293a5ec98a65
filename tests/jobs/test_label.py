"""What `label` shows while it runs."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.label import _Pace
from pipeline.committing import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is; change its only item to let time pass."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_pace_and_time_left_are_told_from_the_first_results_on(clock: list[float]) -> None:
    pace, plan = _Pace(), SimpleNamespace(images=None)

    def described(images: int, share: float, plan: Any = plan) -> str:
        return pace.described(Progress(images, 2, 0, share), plan)

    assert described(0, 0.0) == "0 images, 2 errors"
    clock[0] += 60  # starting
    assert described(1000, 0.1) == "1,000 images, 2 errors"
    clock[0] += 4
    assert described(1400, 0.14) == "1,400 images, 2 errors"
    clock[0] += 4
    assert described(1800, 0.2) == "1,800 images, 2 errors, 100.0/s, 0:01:04 left"
    known: Any = SimpleNamespace(images=9000)
    assert described(1800, 0.2, known).startswith("1,800 of 9,000 images, 2 errors, ")
    clock[0] += 64
    assert described(9000, 1.0) == "9,000 images, 2 errors, 111.1/s, 0:00:00 left"
