"""Tests of the progress output of `label`."""

from __future__ import annotations

import io
import logging
import re
import time
from contextlib import closing
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from jobs.label import Estimate, Estimator, ProgressBar, ProgressLog, describe_progress
from pipeline.commit import Progress
from pipeline.run import Phase


def test_rate_and_remaining_time_are_estimated_from_first_results() -> None:
    now = [100.0]
    estimator = Estimator(clock=lambda: now[0])

    def estimate(images: int, fraction: float) -> Estimate | None:
        return estimator.estimate(Progress(images, 2, 0, fraction))

    assert estimate(0, 0.0) is None
    now[0] += 60  # start-up
    assert estimate(1000, 0.1) is None
    now[0] += 4
    assert estimate(1400, 0.14) is None
    now[0] += 4
    assert estimate(1800, 0.2) == (100.0, timedelta(seconds=64))
    now[0] += 64
    assert estimate(9000, 1.0) == (pytest.approx(111.1, abs=0.05), timedelta(0))


def test_progress_is_described_with_total_and_rate_if_known() -> None:
    unknown: Any = SimpleNamespace(images=None)
    known: Any = SimpleNamespace(images=9000)
    progress, estimate = Progress(1800, 1, 0, 0.2), Estimate(100.0, timedelta(0))
    assert describe_progress(progress, unknown, None) == "1,800 images, 1 error"
    assert describe_progress(progress, known, estimate) == "1,800 of 9,000 images, 1 error, 100.0 images/s"


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

    with closing(ProgressLog(interval=0.05)) as progress_log:
        progress_log.show_phase(Phase.STARTING_RAY)
        assert caplog.messages == ["starting Ray"]
        progress_log.show_plan(plan)
        wait_for(r"starting Ray, \d+ s", 2)
        progress_log.show_progress(Progress(7, 1, 1, 0.5), prepared)
        wait_for("1 of 2 shards, 7 images, 1 error", 3)
        progress_log.show_progress(Progress(9, 1, 2, 1.0), prepared)
    assert caplog.messages[-1].startswith("2 of 2 shards, 9 images, 1 error")
    assert caplog.text.count("2 of 2 shards") == 1


def test_progress_bar_shows_phase_then_both_times(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr("jobs.console.stderr", terminal)
    prepared: Any = SimpleNamespace(plan=SimpleNamespace(images=None, shards=[None, None]))
    now = [0.0]
    with closing(ProgressBar()) as bar:
        bar._estimator = Estimator(clock=lambda: now[0])
        bar.show_phase(Phase.STARTING_RAY)
        assert "starting Ray" in rendered(bar)
        assert "elapsed 0:00:0" in rendered(bar)
        bar.show_progress(Progress(7, 1, 0, 0.25), prepared)
        now[0] = 10
        bar.show_progress(Progress(14, 1, 1, 0.5), prepared)
        lines = rendered(bar).splitlines()
    assert re.search(r"labeling .* 1 of 2 shards, elapsed 0:00:0\d remaining 0:00:20", lines[0])
    assert lines[1].strip() == "14 images, 1 error, 0.7 images/s"


def rendered(bar: ProgressBar) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(bar._bar.get_renderable())
    return capture.get()
