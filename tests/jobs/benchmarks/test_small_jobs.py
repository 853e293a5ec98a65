"""Tests of the benchmark of small jobs: phases, and one small run of the commands."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

import jobs
from jobs.benchmarks.small_jobs import PHASES, command_events, phase_seconds, start
from tests.command import invoke

ROOT = Path(jobs.__file__).parents[1]


def test_phases_add_up_to_the_duration_of_the_command() -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    timings = {"planned": 1.5, "executor_ready": 2.0, "first_result": 4.0, "ended": 5.0}
    ended_at = datetime.fromtimestamp(begin + 6, UTC).isoformat()
    events = command_events({"timings": timings, "ended_at": ended_at}, begin, 6.5)
    assert events["label"] == 1
    phases = phase_seconds(events)
    assert list(phases) == ["label", "planned", "executor_ready", "first_result", "ended", "exit"]
    # The time of `checkpoint_opened`, which the record lacks, is part of the next phase.
    assert phases["planned"] == 1.5
    assert phases["exit"] == 0.5
    assert sum(phases.values()) == 6.5


@pytest.mark.slow
@pytest.mark.long
def test_benchmark_compares_two_versions_by_phase(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--count", 4, "--rounds", 1, "--no-ray", "--against", ROOT, "--output", figures]
    done = invoke(start, *options)
    found = json.loads(figures.read_text())
    commands = [row["command"] for row in found["commands"]]
    assert commands == ["label, in process", "label, nothing new", "plan", "stats", "--help"]
    for row in found["commands"]:
        assert row["fraction_of_other"] == [row["seconds"][0] / row["other_seconds"][0]]
    for column in ("in process", "in process, other"):
        assert all(row[column][0] >= 0 for row in found["phases"])
        assert len(found["phases"]) == len(PHASES)
        times = [row[column][0] for row in found["seconds_from_the_start"]]
        assert times == sorted(times)
        assert times[-1] == pytest.approx(sum(row[column][0] for row in found["phases"]))
    assert "statistics and report" in done.stdout


def test_folder_without_the_command_line_is_refused(tmp_path: Path) -> None:
    done = invoke(start, "--against", tmp_path, status=2)
    assert "has no jobs/cli.py" in " ".join(done.output.split())


@pytest.mark.slow
def test_failed_command_ends_the_benchmark() -> None:
    done = invoke(start, "--count", 2, "--no-ray", "--timeout", 0.1, status=1)
    assert "label: took more than 0.1 s" in done.output
