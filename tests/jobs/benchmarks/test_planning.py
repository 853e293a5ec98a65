"""Tests of the benchmark of planning and commits, at a small scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.benchmarks.planning import planning
from tests.command import invoke


@pytest.mark.slow
def test_planning_and_commit_are_measured(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    invoke(planning, "--shards", 1000, "--rows", 20_480, "--output", figures)
    planned, committed = json.loads(figures.read_text())["planning_and_commit"]
    assert (planned["count"], committed["count"]) == (1100, 20_480)
    assert planned["peak_mib"] > 0
    assert committed["peak_mib"] >= committed["peak_mib_after_a_quarter"] > 0
