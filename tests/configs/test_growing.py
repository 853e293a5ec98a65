"""A cluster that grows only when there is work: a job that begins without any worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.configs.growing_run import IMAGES, SHARDS


def test_a_job_that_begins_on_a_head_alone_goes_on_when_workers_come(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    result = tmp_path / "result.json"
    root = str(Path(__file__).parents[2])
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-") as ray_folder:  # sockets need a short path
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.configs.growing_run", str(tmp_path / "in"), str(result)],
            cwd=root,
            env=os.environ | {"PYTHONPATH": root, "RAY_TMPDIR": ray_folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, err = process.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it stops its Ray
            _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err[-4000:]
    found = json.loads(result.read_text())
    assert (found["images"], found["complete"]) == (SHARDS * IMAGES, True)
    assert found["ray_ready"] < found["grown"] < found["first_result"]
