"""Tests of the progress output of `label`."""

from __future__ import annotations

import logging
import re
import time
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.label import Pace, ProgressLog
from pipeline.commit import Progress


def test_pace_and_time_left_are_shown_from_the_first_results_on() -> None:
    now, plan = [100.0], SimpleNamespace(images=None)
    pace = Pace(clock=lambda: now[0])

    def described(images: int, share: float, plan: Any = plan) -> str:
        return pace.described(Progress(images, 2, 0, share), plan)

    assert described(0, 0.0) == "0 images, 2 errors"
    now[0] += 60  # starting
    assert described(1000, 0.1) == "1,000 images, 2 errors"
    now[0] += 4
    assert described(1400, 0.14) == "1,400 images, 2 errors"
    now[0] += 4
    assert described(1800, 0.2) == "1,800 images, 2 errors, 100.0/s, 0:01:04 left"
    known: Any = SimpleNamespace(images=9000)
    assert described(1800, 0.2, known).startswith("1,800 of 9,000 images, 2 errors, ")
    now[0] += 64
    assert described(9000, 1.0) == "9,000 images, 2 errors, 111.1/s, 0:00:00 left"


def test_progress_is_logged_before_and_between_results(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "cvt_label")
    plan: Any = SimpleNamespace(images=None, shards=[None, None])
    prepared: Any = SimpleNamespace(plan=plan)

    def wait_for(text: str, times: int) -> None:
        end = time.monotonic() + 300
        while len(re.findall(text, caplog.text)) < times:
            assert time.monotonic() < end, caplog.text
            time.sleep(0.01)

    with closing(ProgressLog(interval=0.05)) as shown:
        shown.start(plan)
        wait_for(r"no results yet, after \d+ s", 2)
        shown.update(Progress(7, 1, 1, 0.5), prepared)
        wait_for("1 of 2 shards, 7 images, 1 errors", 3)
        shown.update(Progress(9, 1, 2, 1.0), prepared)
    assert caplog.messages[-1].startswith("2 of 2 shards, 9 images, 1 errors")
    assert caplog.text.count("2 of 2 shards") == 1
