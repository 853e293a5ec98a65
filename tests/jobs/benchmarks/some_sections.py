"""Sections for the tests of `jobs.benchmarks.sections`, which run in their own process."""

from __future__ import annotations

import os
import time
from pathlib import Path

from jobs.benchmarks.sections import CannotRunError, CheckError, Report, Row, run_as_section


def succeed(settings: Row, report: Report) -> None:
    report({"doubled": 2 * settings["number"]})


def fail_a_check(settings: Row, report: Report) -> None:
    report({"found": 1})
    raise CheckError("2 images are missing")


def need_a_gpu(settings: Row, report: Report) -> None:
    raise CannotRunError("needs a GPU")


def raise_an_error(settings: Row, report: Report) -> None:
    raise KeyError("name")


def crash(settings: Row, report: Report) -> None:
    report({"found": 1})
    print("last words", flush=True)
    os._exit(134)


def hang(settings: Row, report: Report) -> None:
    if os.fork() == 0:  # a process that the section has started
        time.sleep(3)
        Path(settings["file"]).write_text("still running")
    report({"found": 1})
    time.sleep(60)


if __name__ == "__main__":
    sections = (succeed, fail_a_check, need_a_gpu, raise_an_error, crash, hang)
    run_as_section({section.__name__: section for section in sections})
