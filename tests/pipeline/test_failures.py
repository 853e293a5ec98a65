"""What dies in mid-run costs seconds, and neither loses a sample nor yields one twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.failing_run import IMAGES, SHARDS

STALL_S = 45


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `failing_run` found: one run, in which a decoder, a classifier and a node died in turn."""
    folder = tmp_path_factory.mktemp("failing") / "in"
    folder.mkdir()
    result = folder.with_name("result.json")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-") as ray_folder:  # sockets need a short path
        root = str(Path(__file__).parents[2])
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.pipeline.failing_run", str(folder), str(result)],
            cwd=root,
            env=os.environ | {"PYTHONPATH": root, "RAY_TMPDIR": ray_folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, err = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it stops its Ray
            _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err[-4000:]
    return json.loads(result.read_text())


@pytest.mark.parametrize("failure", ["decoder", "classifier", "node"])
def test_the_run_goes_on_after_a_failure(run: dict[str, Any], failure: str) -> None:
    assert run["after"][failure] > 0
    assert run["stall"][failure] < STALL_S


def test_every_sample_comes_out_exactly_once(run: dict[str, Any]) -> None:
    assert (run["samples"], run["twice"], run["errors"]) == (SHARDS * IMAGES, 0, 0)
    assert (run["shards"], run["complete"]) == (SHARDS, True)
