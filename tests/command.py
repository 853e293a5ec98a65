"""Runs `cvt-label` in this process or in a new process."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable

from click.testing import Result
from typer.testing import CliRunner

from jobs.cli import make_app, make_cli
from jobs.console import add_command

CompletedProcess = subprocess.CompletedProcess[str]


def invoke(command: Callable[..., None], *arguments: object, status: int = 0) -> Result:
    """Runs the function of a command in this process and checks its exit status."""
    app = make_app()
    add_command(app, command)
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def cvt_label(*arguments: object, **environment: str) -> CompletedProcess:
    """Runs `cvt-label` in this process. The caller checks the exit status.

    Do not use for commands that start Ray or log: pytest owns the logging of this process.
    """
    words = [str(argument) for argument in arguments]
    result = CliRunner(env=environment).invoke(make_cli(words[0]), words, prog_name="cvt-label")
    stderr = result.stderr
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        stderr += "".join(traceback.format_exception(result.exception))
    return CompletedProcess(words, result.exit_code, result.stdout, stderr)


def cvt_label_process(*arguments: object, timeout: float = 900, **environment: str) -> CompletedProcess:
    """Runs `cvt-label` in a new process. The caller checks the exit status."""
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
