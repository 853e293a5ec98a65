"""Runs scripts that start their own Ray, in separate processes: the test process uses another Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: Seconds that a script may take to stop its Ray.
_STOP_TIMEOUT_S = 180


def run_script(module: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Runs `python -m MODULE INPUT RESULT`, and returns the JSON that the script wrote to RESULT.

    Args:
        module: module name of the script.
        folder: contains the input folder, which is empty at first, the result and the output.
        seconds: time limit; the script is interrupted then, and fails.
    """
    given, result = folder / "in", folder / "result.json"
    given.mkdir()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-") as ray_folder:  # sockets need a short path
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(given), str(result)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": ray_folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # the script stops its Ray
            _, err = process.communicate(timeout=_STOP_TIMEOUT_S)
    assert process.returncode == 0, err[-4000:]
    found: dict[str, Any] = json.loads(result.read_text())
    return found
