"""Runs each contender in its own process, counts its labels and measures its speed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow.dataset as ds

from jobs.benchmarks.contenders import ENGINE, PIPELINE, Task
from jobs.benchmarks.figures import BenchmarkError
from jobs.benchmarks.sections import section_environment


@dataclass
class ContenderResult:
    """The results of one contender, as docs/reference/benchmarks.md defines them. Lists are by round.

    The speedup is that of this pipeline over the contender.
    """

    contender: str
    seconds: list[float] = field(default_factory=list)
    first_labels_s: list[float] = field(default_factory=list)
    images_per_s: list[float] = field(default_factory=list)
    pipeline_speedup: list[float] = field(default_factory=list)
    cost_per_million: float | None = None
    failure: str | None = None


def run_contender(result: ContenderResult, task: Task, images: int, timeout: float) -> None:
    """Runs a contender, counts its labels, and adds its results to `result`.

    Raises:
        BenchmarkError: the contender did not label each of `images` images once.
    """
    start = time.monotonic()
    result.failure = run_process(result.contender, task, timeout)
    seconds = time.monotonic() - start
    if result.failure is not None:
        return
    if result.contender != ENGINE:
        check_labels(result.contender, task.output, images)
    events = read_events(task)
    result.seconds.append(seconds)
    result.first_labels_s.append(events[0][0] - start)
    result.images_per_s.append(contender_rate(result.contender, events))


def run_process(contender: str, task: Task, timeout: float) -> str | None:
    """Runs a contender in its own process. Returns the reason of a failure, or None."""
    described, log = Path(f"{task.output}.json"), Path(f"{task.output}.log")
    described.write_text(json.dumps(asdict(task)))
    python = [sys.executable, "-m", "jobs.benchmarks.contenders", contender, str(described)]
    try:
        with log.open("wb") as file:
            environment = section_environment()
            subprocess.run(python, stdout=file, stderr=file, env=environment, timeout=timeout, check=True)
    except subprocess.TimeoutExpired:
        return f"timed out after {timeout:,.0f} s"
    except subprocess.CalledProcessError as error:
        lines = log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {error.returncode}"
    return None


def check_labels(contender: str, output: str, images: int) -> None:
    """Checks that the Parquet files have each image once, with a label.

    Raises:
        BenchmarkError: an image has no label, or not exactly one row.
    """
    pattern = "model=*/predictions/**/*.parquet" if contender == PIPELINE else "*.parquet"
    table = ds.dataset(sorted(Path(output).glob(pattern))).to_table(columns=["key", "label", "score"])
    if table["label"].null_count or table["score"].null_count:
        raise BenchmarkError(f"{contender}: some images have no label")
    keys = [Path(key).stem for key in table["key"].to_pylist()]
    expected = {f"{number:09d}" for number in range(images)}
    if len(keys) != images or set(keys) != expected:
        found = f"{len(keys):,} rows for {len(expected.intersection(keys)):,} images"
        raise BenchmarkError(f"{contender}: expected one row for each of {images:,} images, found {found}")


def read_events(task: Task) -> list[tuple[float, int]]:
    """Returns the time and the number of images of each labeled batch, in order of time."""
    lines = [line.split() for line in task.events.read_text().splitlines()]
    return sorted((float(at), int(images)) for images, at in lines)


def contender_rate(contender: str, events: Sequence[tuple[float, int]]) -> float:
    """Returns the images/s from the first labeled batch or chunk to the last.

    Raises:
        BenchmarkError: all images were labeled at the same time.
    """
    (first, _), *others = events
    if not others or others[-1][0] <= first:
        raise BenchmarkError(
            f"{contender}: too few images for a steady state: all were labeled at the same time"
        )
    return sum(images for _, images in others) / (others[-1][0] - first)
