"""Scripts that make a Ray of their own, in a process of their own: the tests' is connected to another."""

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
#: Seconds that a script has to stop its Ray.
_STOP_SECONDS = 180


def run_script(module: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Runs `python -m MODULE INPUT RESULT`, and returns what it wrote to RESULT as JSON.

    Args:
        module: the script.
        folder: where the folder of its input, which is empty, its result and its output go.
        seconds: it is interrupted after so many, and has failed.
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
            process.send_signal(signal.SIGINT)  # it stops its Ray
            _, err = process.communicate(timeout=_STOP_SECONDS)
    assert process.returncode == 0, err[-4000:]
    found: dict[str, Any] = json.loads(result.read_text())
    return found
