"""A cluster that grows only when there is work: a job that begins without any worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.configs.growing_run import IMAGES, SHARDS
from tests.own_ray import run_script

pytestmark = pytest.mark.slow


def test_a_job_that_begins_on_a_head_alone_goes_on_when_workers_come(tmp_path: Path) -> None:
    found = run_script("tests.configs.growing_run", tmp_path, 600)
    assert (found["images"], found["complete"]) == (SHARDS * IMAGES, True)
    assert found["executor_ready"] < found["grown"] < found["first_result"]
