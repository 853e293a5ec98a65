"""Runs of contenders: each is a process of its own, whose labels are counted and whose speed is measured."""

from __future__ import annotations

import io
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import jobs
from jobs.benchmarks.contenders import OURS, Task
from jobs.benchmarks.figures import BenchmarkError
from jobs.local_s3 import LocalS3
from pipeline.storage import Storage

_BUCKET = "benchmark"


@dataclass(frozen=True)
class Run:
    """One run of one contender; times are in seconds from the start of its process.

    Attributes:
        seconds: duration of the process.
        rate: images/s in steady state, from the first labeled batch or chunk to the last.
        first_labels: time of the first labeled batch or chunk.
        first_commit: time of this pipeline's first committed shard.
        record: `runs/<id>.json` of this pipeline's run.
        failure: why there are no figures, or None.
    """

    seconds: float = 0.0
    rate: float = 0.0
    first_labels: float = 0.0
    first_commit: float | None = None
    record: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None


@contextmanager
def in_local_s3(task: Task) -> Iterator[Task]:
    """Copies the tars to an S3 server on this machine, and yields a task that reads and writes there.

    Raises:
        LocalS3Error: the server cannot be started.
    """
    with LocalS3() as server:
        os.environ.update(server.environment())  # for this process and those that it starts
        server.create_bucket(_BUCKET)
        there = replace(task, tars=f"s3://{_BUCKET}/shards", output=f"s3://{_BUCKET}/labels")
        for path in sorted(Path(task.tars).iterdir()):
            with path.open("rb") as tar:
                Storage().write(f"{there.tars}/{path.name}", tar)
        yield there


def run_contender(name: str, task: Task, images: int, timeout: float) -> Run:
    """Runs a contender, with an output of its own, and counts its labels.

    Raises:
        BenchmarkError: not each of `images` is labeled once.
    """
    attempt = secrets.token_hex(4)
    task = replace(task, output=f"{task.output}-{attempt}", events=f"{task.events}-{attempt}")
    start = time.monotonic()
    failure = run_module(["contenders", name], task, timeout)
    seconds = time.monotonic() - start
    if failure is not None:
        return Run(failure=failure)
    check_labels(name, task.output, images)
    events = read_events(task)
    first_labels = next(at for at, count in events if count) - start
    run = Run(seconds, steady_rate(name, events), first_labels)
    if name != OURS:
        return run
    [uri] = [i.uri for i in Storage().list(task.output) if "/runs/" in i.uri and i.uri.endswith(".json")]
    record = json.loads(Storage().read(uri))
    first_commit = events[0][0] - start + record["seconds"]["first_commit"]  # the record's clock starts later
    return replace(run, record=record, first_commit=first_commit)


def run_module(command: list[str], task: Task, timeout: float) -> str | None:
    """Runs a module of this package in a process group of its own; returns why it failed, or None."""
    described, log = Path(f"{task.events}.json"), Path(f"{task.events}.log")
    described.write_text(json.dumps(asdict(task)))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(Path(jobs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        ),
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "DAFT_ANALYTICS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray writes one into the home folder
    }
    environment.pop("RAY_ADDRESS", None)
    python = [sys.executable, "-m", f"jobs.benchmarks.{command[0]}", *command[1:], str(described)]
    with log.open("wb") as file:
        process = subprocess.Popen(python, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"not done after {timeout:,.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(errors="replace").strip().splitlines() or [f"exit status {status}"]
    return lines[-1] if status else None


def check_labels(name: str, output: str, images: int) -> None:
    """Checks that the Parquet files have each image once, with a label.

    Raises:
        BenchmarkError: they do not.
    """
    folder = "/predictions/" if name == OURS else "/"
    keys: list[str] = []
    for info in Storage().list(output):
        if info.uri.endswith(".parquet") and folder in info.uri:
            table = pq.read_table(io.BytesIO(Storage().read(info.uri)), columns=["key", "label", "score"])
            if table["label"].null_count or table["score"].null_count:
                raise BenchmarkError(f"{name}: {info.uri} has images without a label")
            keys += (Path(key).stem for key in table["key"].to_pylist())
    expected = {f"{number:09d}" for number in range(images)}
    if len(keys) != images or set(keys) != expected:
        found = f"{len(keys):,} labels of {len(expected.intersection(keys)):,} images"
        raise BenchmarkError(f"{name}: expected labels of {images:,} images, found {found}")


def read_events(task: Task) -> list[tuple[float, int]]:
    """Returns when images were labeled, and how many; processes may have written out of order."""
    lines = [line.split() for line in Path(task.events).read_text().splitlines()]
    return sorted((float(at), int(images)) for images, at in lines)


def steady_rate(name: str, events: Sequence[tuple[float, int]]) -> float:
    """Returns images/s after the first labeled batch or chunk, to the last.

    Raises:
        BenchmarkError: all images came at once.
    """
    (first, _), *others = [event for event in events if event[1]]
    if not others or others[-1][0] <= first:
        raise BenchmarkError(f"{name}: too few images for a steady state: all came out at once")
    return sum(images for _, images in others) / (others[-1][0] - first)
