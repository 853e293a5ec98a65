"""Measures the peak memory and the time of a function in a child process."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

#: Modules that the parent of all children imports once.
_PRELOADED = ["pipeline.decode", "pipeline.read", "pytest", "cvt.checkpoints"]


class Measured(NamedTuple):
    """What a call cost.

    Attributes:
        outcome: the result; the exception if the call raised one; None if the process died or was stopped.
        peak: highest memory during the call in bytes, minus the memory of the process before the call.
        seconds: duration of the call.
        exit_code: exit status of the process; -9 for SIGKILL, also if the call took longer than its limit.
    """

    outcome: Any
    peak: int
    seconds: float
    exit_code: int | None


def measure(function: Callable[..., Any], *arguments: Any, limit_s: float = 60, **options: Any) -> Measured:
    """Calls a function in a child process that has imported everything, and measures the call.

    Args:
        function: a function of a module, not a lambda; its result must be small, since it is pickled.
        arguments: positional arguments.
        limit_s: seconds after which the process is killed.
        options: keyword arguments.
    """
    context = _context(function.__module__)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_call, args=(sender, function, arguments, options))
    child.start()
    sender.close()
    started, peak, before = time.monotonic(), 0, 0
    outcome, seconds = None, limit_s
    try:
        if receiver.poll(limit_s):  # started: the imports are done
            before, started = receiver.recv(), time.monotonic()
            if receiver.poll(limit_s):
                outcome, peak, seconds = receiver.recv()
            else:
                peak = _memory(child.pid, "VmHWM")
    except EOFError:  # the process died
        seconds = time.monotonic() - started
    child.join(0 if seconds >= limit_s else 5)
    if child.is_alive():
        child.kill()
        child.join()
    measured = Measured(outcome, max(0, peak - before), seconds, child.exitcode)
    print(f"{measured.peak / 1024**2:.1f} MiB, {seconds:.2f} s: {outcome!r}")  # pytest -rP shows it
    return measured


def _call(
    sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    outcome: Any
    sender.send(_memory(os.getpid(), "VmRSS"))
    started = time.perf_counter()
    try:
        outcome = function(*arguments, **options)
    except Exception as error:
        outcome = error
    seconds = time.perf_counter() - started
    # The peak of a forked process starts at its memory after the fork.
    sender.send((outcome, _memory(os.getpid(), "VmHWM"), seconds))


def _memory(pid: int | None, field: str) -> int:
    """Returns a size in bytes from the status of a process."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


@functools.cache
def _context(module: str) -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, module, *_PRELOADED])
    return context
