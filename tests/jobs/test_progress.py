"""Tests of the progress on a terminal and in the log."""

from __future__ import annotations

import io
import logging
import re
import time

import pytest
from rich.console import Console

from jobs.progress import ProgressView


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
        view.show_progress("1 of 2 shards", 0.5)
        wait_for("1 of 2 shards", 3)
        view.show_progress("2 of 2 shards", 1.0)
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
        view.show_progress("1 of 2 shards, 14 images", 0.5)
        bar, description = rendered(view).splitlines()
    assert re.search(r"labeling .* elapsed 0:00:0\d", bar)
    assert description.strip() == "1 of 2 shards, 14 images"
    assert view.tasks[0].percentage == 50


def rendered(view: ProgressView) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(view.get_renderable())
    return capture.get()
