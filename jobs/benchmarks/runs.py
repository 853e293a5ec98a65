"""Runs each contender in its own process, counts its labels and measures its speed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.benchmarks.contenders import COMMANDS, ENGINE, Task, config_sections
from jobs.benchmarks.figures import BenchmarkError
from jobs.benchmarks.sections import section_environment
from pipeline.statistics import steady_rate
from pipeline.storage import Storage, read_table


@dataclass
class ContenderResult:
    """The results of one contender for one number of images, as docs/reference/benchmarks.md defines them.

    Lists are by round. Without a steady state of ten seconds, a round has no rate.
    """

    contender: str
    images: int
    seconds: list[float] = field(default_factory=list)
    seconds_ratio: list[float] = field(default_factory=list)
    seconds_ratio_in_process: list[float] = field(default_factory=list)
    first_labels_s: list[float] = field(default_factory=list)
    images_per_s: list[float] = field(default_factory=list)
    pipeline_speedup: list[float] = field(default_factory=list)
    cost_per_million: float | None = None
    failure: str | None = None


def run_contender(result: ContenderResult, task: Task, timeout: float) -> None:
    """Runs a contender, counts its labels, and adds its results to `result`.

    Raises:
        BenchmarkError: the contender did not label each image once.
    """
    started_at, start = time.time(), time.monotonic()
    result.failure = run_process(result.contender, task, timeout)
    seconds = time.monotonic() - start
    if result.failure is not None:
        return
    if result.contender != ENGINE:
        check_labels(result.contender, task.output, result.images)
    if result.contender in COMMANDS:
        record = read_record(task.output)
        timings, rate = record["timings"], record["images_per_s"]
        ended = datetime.fromisoformat(record["ended_at"]).timestamp() - started_at
        first = ended - timings["ended"] + timings["first_result"]
    else:
        events = read_events(task)
        first, rate = events[0][0] - start, contender_rate(events)
    result.seconds.append(seconds)
    result.first_labels_s.append(first)
    if rate is not None:
        result.images_per_s.append(rate)


def run_process(contender: str, task: Task, timeout: float) -> str | None:
    """Runs a contender in its own process. Returns the reason of a failure, or None."""
    log, described = Path(f"{task.local}.log"), Path(f"{task.local}.json")
    if contender in COMMANDS:
        described.write_text(json.dumps(config_sections(task)))  # JSON is YAML
        arguments = ["jobs.cli", "label", "--config", str(described), *COMMANDS[contender]]
        for override in task.overrides:
            arguments += ["--set", override]
    else:
        described.write_text(json.dumps(asdict(task)))
        arguments = ["jobs.benchmarks.contenders", contender, str(described)]
    python = [sys.executable, "-m", *arguments]
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
    storage = Storage()
    files = [info.uri for info in storage.list(output) if info.uri.endswith(".parquet")]
    if contender in COMMANDS:
        files = [uri for uri in files if "/predictions/" in uri]
    columns = ["key", "label", "score"]
    table = pa.concat_tables(read_table(io.BytesIO(storage.read(uri)), columns) for uri in files)
    if table["label"].null_count or table["score"].null_count:
        raise BenchmarkError(f"{contender}: some images have no label")
    keys = [Path(key).stem for key in table["key"].to_pylist()]
    expected = {f"{number:09d}" for number in range(images)}
    if len(keys) != images or set(keys) != expected:
        found = f"{len(keys):,} rows for {len(expected.intersection(keys)):,} images"
        raise BenchmarkError(f"{contender}: expected one row for each of {images:,} images, found {found}")


def read_record(output: str) -> dict[str, Any]:
    """Returns the record of the only run of this pipeline."""
    storage = Storage()
    [uri] = [info.uri for info in storage.list(output) if "/runs/" in info.uri]
    record: dict[str, Any] = json.loads(storage.read(uri))
    return record


def read_events(task: Task) -> list[tuple[float, int]]:
    """Returns the time and the number of images of each labeled batch, in order of time."""
    lines = [line.split() for line in task.events.read_text().splitlines()]
    return sorted((float(at), int(images)) for images, at in lines)


def contender_rate(events: Sequence[tuple[float, int]]) -> float | None:
    """Returns the images/s from the first labeled batch to the last; None if the time is too short."""
    (first, _), *others = events
    return steady_rate(sum(images for _, images in others), events[-1][0] - first)
