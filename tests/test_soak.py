from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_short_soak_loses_and_duplicates_no_sample() -> None:
    """`make soak` runs longer soaks."""
    command = [sys.executable, "-m", "tests.soak", "--rounds", "3", "--seed", "5", "--ray-every", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("rounds: 3", "run on Ray: 1", "samples lost: 0", "samples duplicated: 0"):
        assert line in done.stdout
    assert "SIGKILL: " in done.stdout
