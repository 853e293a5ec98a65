"""The command `cvt-label`, as a process of its own, and single commands in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from click.testing import Result
from typer.testing import CliRunner

from jobs.console import make_app


def invoke(command: Callable[..., None], *arguments: object, status: int = 0) -> Result:
    """Runs a command in this process, and checks its exit status."""
    app = make_app()
    app.command()(command)
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


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
