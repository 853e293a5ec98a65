"""Runs of the job in child processes that die at a chosen storage write.

The runs do not use Ray, which has no effect on the written objects.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import pytest
import torch

from pipeline.commit import committer as committing
from pipeline.commit import lease, manifest_writer
from pipeline.config import Config, Selection, load_config
from pipeline.run import labeling, make_job, rebuild
from pipeline.storage import Storage
from tests.runs import IN_PROCESS, small_groups

torch.set_num_threads(1)  # a forked child can't use the threads of its parent

#: Modules that a run imports when needed. The parent process imports them once, which saves most of the time
#: of a child.
_PRELOADED = [
    "pandas",
    "cvt.checkpoints",
    "cvt.inference.engine",
    "pipeline.dataflow.local_executor",
    "pipeline.report.sections",
]

#: Exit status of a run that lost its lease to another run.
OVERTAKEN = 5

Moment = Literal["before", "after"]


@dataclass(frozen=True)
class Crash:
    """The storage write (or removal) at which a run dies, counted from 1."""

    number: int
    moment: Moment


def _dying(action: Callable[..., Any], crash: Crash, done: Any) -> Callable[..., Any]:
    @functools.wraps(action)
    def act(*args: Any, **options: Any) -> Any:
        with done.get_lock():
            done.value += 1
            due = done.value == crash.number
        if due and crash.moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = action(*args, **options)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return act


def _run(
    environment: dict[str, str], overrides: list[str], selection: Selection | None, crash: Crash | None
) -> None:
    os.environ |= environment
    patch = pytest.MonkeyPatch()
    small_groups(patch)
    patch.setattr(committing, "MAX_CONCURRENT_WRITES", 1)
    patch.setattr(manifest_writer, "MAX_PENDING", 2)
    # Do not wait for the lease of a killed run to expire.
    patch.setattr(lease.LeaseContent, "is_live", False)
    if crash is not None:
        done = multiprocessing.Value("i", 0)
        for name in ("write", "delete"):
            patch.setattr(Storage, name, _dying(getattr(Storage, name), crash, done))
    config = load_config(Config, None, [*IN_PROCESS, *overrides])
    try:
        if selection is None:
            rebuild(make_job(config).partition)
        else:
            labeling.label(config, selection=selection)
    except lease.LeaseLostError:
        sys.exit(OVERTAKEN)


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *_PRELOADED])
    return context


def start(overrides: list[str], selection: Selection | None, crash: Crash | None = None) -> BaseProcess:
    """Starts a run of the job in a child process; without a selection, `stats --rebuild`."""
    child = _context().Process(target=_run, args=(dict(os.environ), overrides, selection, crash))
    child.start()
    return child


def run(overrides: list[str], selection: Selection | None, crash: Crash | None = None) -> bool:
    """Runs the job as `start` does, and waits; returns whether the run ended without dying.

    Raises:
        RuntimeError: the run ended in another way.
    """
    child = start(overrides, selection, crash)
    child.join(120)
    if child.exitcode not in (0, -signal.SIGKILL):
        child.kill()
        raise RuntimeError(f"the run ended with {child.exitcode}")
    return child.exitcode == 0
