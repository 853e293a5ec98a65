"""Runs parts of a benchmark, each in its own process with a time limit.

A crash, a hang or a full GPU costs one section only. A section reports its rows as it measures them, so that
the rows of a section that is killed are kept.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jobs

Row = dict[str, Any]
#: Called by a section with each row that it has measured.
Report = Callable[[Row], None]

OK, FAILED, NOT_RUN = "ok", "failed", "not run"


class CannotRunError(Exception):
    """A section cannot run on this machine: the message is the reason. This is not a failure."""


class CheckError(Exception):
    """A check failed: a result is wrong, or images are missing."""


@dataclass
class SectionResult:
    """The outcome of a section.

    Attributes:
        status: `OK`; `FAILED` if a check failed or the process died; `NOT_RUN` with its reason otherwise.
        seconds: duration of the process.
    """

    section: str
    status: str
    reason: str | None = None
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)


def run_section(
    module: str, section: str, settings: Mapping[str, Any], timeout: float, log: Path | None = None
) -> SectionResult:
    """Runs `python -m MODULE`, which calls `run_as_section`; returns the rows also after a failure.

    Args:
        module: name of the module.
        section: name of the section.
        settings: passed to the section; must be valid JSON.
        timeout: seconds after which the process is killed.
        log: file for the output of the process. Default: no file.
    """
    with tempfile.TemporaryDirectory(prefix="section-") as folder:
        file, output = Path(folder, "settings.json"), log or Path(folder, "log")
        result = Path(folder, "result.json")
        file.write_text(json.dumps(settings))
        start, reason = time.monotonic(), None
        command = [sys.executable, "-m", module, section, str(file), str(result)]
        status = 0
        with output.open("wb") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, env=section_environment(), start_new_session=True
            )
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                reason = f"stopped after {timeout:,.0f} s"
            finally:  # also after Ctrl-C: the section and the processes that it has started
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = round(time.monotonic() - start, 1)
        try:
            found = json.loads(result.read_text())
        except (OSError, ValueError):
            found = {"status": None, "reason": None, "rows": []}
        if found["status"] is not None:
            return SectionResult(section, found["status"], found["reason"], seconds, found["rows"])
        if reason is not None:
            return SectionResult(section, NOT_RUN, reason, seconds, found["rows"])
        lines = output.read_text(errors="replace").strip().splitlines()
        reason = f"the process ended with status {status}: {lines[-1] if lines else 'no output'}"
        return SectionResult(section, FAILED, reason, seconds, found["rows"])


def memory_mb(reset: bool = False) -> int:
    """Returns the peak memory of this process in MB; with `reset`, its memory now, which starts a new peak.

    Other systems than Linux start no new peak, and may count memory of the parent process.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 10**6
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    [line] = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 // 10**6


def section_environment() -> dict[str, str]:
    """Returns the environment of a process that measures: this project, no network, no existing Ray."""
    path = os.pathsep.join([str(Path(jobs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "DAFT_ANALYTICS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # without it, Ray writes a token into the home folder
    }
    environment.pop("RAY_ADDRESS", None)
    return environment


def run_as_section(sections: Mapping[str, Callable[[Row, Report], None]]) -> None:
    """Runs the section that the command line names, and writes its result after each row."""
    name, settings, target = sys.argv[1:]
    rows: list[Row] = []

    def write(status: str | None, reason: str | None = None) -> None:
        partial = Path(f"{target}.part")
        partial.write_text(json.dumps({"status": status, "reason": reason, "rows": rows}, default=str))
        partial.replace(target)

    def report(row: Row) -> None:
        rows.append(row)
        write(None)

    try:
        sections[name](json.loads(Path(settings).read_text()), report)
    except CannotRunError as error:
        write(NOT_RUN, str(error))
    except CheckError as error:
        write(FAILED, str(error))
    except Exception as error:
        traceback.print_exc()
        write(FAILED, f"{type(error).__name__}: {error}")
    else:
        write(OK)
