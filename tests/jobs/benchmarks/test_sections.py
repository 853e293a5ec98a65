"""Tests of sections: every end of a section's process is reported, with the rows that were measured."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from jobs.benchmarks.sections import FAILED, NOT_RUN, OK, run_section

MODULE = "tests.jobs.benchmarks.some_sections"


@pytest.mark.parametrize(
    ("section", "status", "reason", "rows"),
    [
        ("succeed", OK, None, [{"doubled": 42}]),
        ("fail_a_check", FAILED, "2 images are missing", [{"found": 1}]),
        ("need_a_gpu", NOT_RUN, "needs a GPU", []),
        ("raise_an_error", FAILED, "KeyError: 'name'", []),
        ("crash", FAILED, "the process ended with status 134: last words", [{"found": 1}]),
    ],
)
def test_end_of_a_section_is_reported(
    section: str, status: str, reason: str | None, rows: list[object]
) -> None:
    result = run_section(MODULE, section, {"number": 21}, timeout=60)
    assert (result.section, result.status, result.reason, result.rows) == (section, status, reason, rows)
    assert result.seconds > 0


def test_section_that_takes_too_long_is_stopped_with_its_processes(tmp_path: Path) -> None:
    result = run_section(MODULE, "hang", {"file": str(tmp_path / "late")}, timeout=2)
    assert (result.status, result.reason, result.rows) == (NOT_RUN, "stopped after 2 s", [{"found": 1}])
    time.sleep(3)
    assert not (tmp_path / "late").exists()
