"""A cluster that scales up on demand: the job starts without any worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.configs.growing_run import IMAGES, SHARDS
from tests.own_ray import run_script

pytestmark = pytest.mark.slow


def test_job_on_a_head_without_workers_continues_when_workers_join(tmp_path: Path) -> None:
    found = run_script("tests.configs.growing_run", tmp_path, 600)
    assert (found["images"], found["complete"]) == (SHARDS * IMAGES, True)
    assert found["executor_ready"] < found["grown"] < found["first_result"]
