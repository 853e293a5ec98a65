"""The command `cvt-label`, as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def cvt_label(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs it to its end; its status is for the caller to look at."""
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
