"""The command `cvt-label`, in this process or as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable

from click.testing import Result
from typer.testing import CliRunner

from jobs.cli import make_cli
from jobs.console import make_app

Done = subprocess.CompletedProcess[str]


def invoke(command: Callable[..., None], *arguments: object, status: int = 0) -> Result:
    """Runs the function of a command in this process, and checks its exit status."""
    app = make_app()
    app.command()(command)
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def cvt_label(*arguments: object, **environment: str) -> Done:
    """Runs the command in this process to its end; the caller checks the status.

    Not for commands that start a Ray or log: logging is pytest's in this process.
    """
    given = [str(argument) for argument in arguments]
    result = CliRunner(env=environment).invoke(make_cli(given[0]), given, prog_name="cvt-label")
    stderr = result.stderr
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        stderr += "".join(traceback.format_exception(result.exception))
    return Done(given, result.exit_code, result.stdout, stderr)


def cvt_label_process(*arguments: object, timeout: float = 900, **environment: str) -> Done:
    """Runs the command as a process of its own to its end; the caller checks the status."""
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
