"""Tests of the progress on a terminal and in the log."""

from __future__ import annotations

import io
import logging
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from jobs import console
from jobs.label import describe_progress
from jobs.progress import ProgressView
from pipeline.commit import Progress


def test_phase_and_progress_are_logged_at_intervals(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cvt_label")

    def wait_for(text: str, times: int) -> None:
        end = time.monotonic() + 300
        while len(re.findall(text, caplog.text)) < times:
            assert time.monotonic() < end, caplog.text
            time.sleep(0.01)

    with ProgressView("labeling", interval=0.05) as view:
        view.show_phase("starting Ray")
        assert caplog.messages == ["starting Ray"]
        wait_for(r"starting Ray, \d+ s", 2)
        view.show_progress("1 of 2 shards", 1, 0.5)
        wait_for("1 of 2 shards", 3)
        view.show_progress("2 of 2 shards", 2, 1.0)
        view.show_phase("writing")
        logged = caplog.messages[:]
        wait_for(r"writing, \d+ s", 2)
    assert logged[-2:] == ["2 of 2 shards", "writing"]
    count = len(caplog.messages)
    time.sleep(0.2)
    assert len(caplog.messages) == count


def test_progress_bar_shows_phase_then_description(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr("jobs.console.stderr", terminal)
    with ProgressView("labeling") as view:
        view.show_phase("starting Ray")
        assert re.search(r"starting Ray .* elapsed 0:00:0\d", rendered(view))
        view.show_progress("1 of 2 shards, 14 images", 14, 0.5)
        bar, description = rendered(view).splitlines()
    assert re.search(r"labeling .* elapsed 0:00:0\d", bar)
    assert description.strip() == "1 of 2 shards, 14 images"
    assert view.tasks[0].percentage == 50


def test_remaining_time_fits_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.console.stderr", Console(file=io.StringIO(), force_terminal=True, width=80))
    plan: Any = SimpleNamespace(images=123_456_789, shards=[None] * 12_345)
    now = [0.0]
    with ProgressView("labeling", clock=lambda: now[0]) as view:
        for images in (1, 1_000_001):
            progress = Progress(images, 1_234, 12, images / 100_000_000)
            view.show_progress(describe_progress(progress, plan), images, progress.fraction)
            now[0] += 500
        shown = rendered(view)
    text = "1,000,001 of 123,456,789 images, 1,234 errors, 2,000.0 images/s, remaining 13:45:00"
    assert text in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


def test_rate_and_remaining_time_are_estimated_from_first_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.console.stderr", Console(file=io.StringIO(), force_terminal=True, width=80))
    now = [100.0]
    view = ProgressView("labeling", clock=lambda: now[0])

    def estimate(images: int, fraction: float) -> str:
        view.show_progress("1 of 2 shards", images, fraction)
        return rendered(view)

    assert "images/s" not in estimate(0, 0.0)
    now[0] += 60  # start-up
    assert "images/s" not in estimate(1000, 0.1)
    now[0] += 4
    assert "images/s" not in estimate(1400, 0.14)
    now[0] += 4
    assert ", 100.0 images/s, remaining 0:01:04" in estimate(1800, 0.2)
    now[0] += 64
    assert ", 111.1 images/s, remaining 0:00:00" in estimate(9000, 1.0)


def test_progress_is_described_with_total_if_known() -> None:
    unknown: Any = SimpleNamespace(images=None, shards=[None, None])
    known: Any = SimpleNamespace(images=9000, shards=[None, None])
    progress = Progress(1800, 1, 0, 0.2)
    assert describe_progress(progress, unknown) == "0 of 2 shards, 1,800 images, 1 error"
    assert describe_progress(progress, known) == "0 of 2 shards, 1,800 of 9,000 images, 1 error"


def test_notice_is_printed_above_the_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = io.StringIO()
    monkeypatch.setattr("jobs.console.stderr", Console(file=output, force_terminal=True, width=80))
    with ProgressView("labeling") as view:
        view.refresh()
        console.print_notice("4 shards: 4 new; [bold] :smile:")
    # The bar's line is erased, and the bar is drawn again below the notice.
    assert re.search(r"\x1b\[2K4 shards: 4 new; \[bold\] :smile:\nstarting ", output.getvalue())
    assert capsys.readouterr() == ("", "")


def rendered(view: ProgressView) -> str:
    terminal = Console(width=80)
    with terminal.capture() as capture:
        terminal.print(view.get_renderable())
    return capture.get()
