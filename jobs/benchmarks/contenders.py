"""Whole runs of the pipeline and its peers, counted and timed.

A contender is a process of its own, from its start to its end, so that threads, memory and Ray are its own;
its labels are counted, and its speed comes from the times at which they were made.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

import jobs
from cvt.checkpoints import save_checkpoint
from jobs.benchmarks.peers import PEERS, Task
from jobs.local_s3 import LocalS3
from pipeline.storage import Storage

if TYPE_CHECKING:
    from jobs.benchmarks.data import Dataset
    from pipeline.train import TrainingModel


#: The contender that the others are compared with.
OURS = "pipeline"


_BUCKET = "benchmark"


class WrongCountError(RuntimeError):
    """Something lost images, or made some up: then its speed is none."""


class ContenderError(RuntimeError):
    """A process that is needed for any figure failed, or was not done in time."""


@dataclass(frozen=True)
class Run:
    """One run of one contender.

    Attributes:
        name: `OURS`, or of one of `PEERS`.
        images: that it labelled.
        seconds: of its process, from start to end.
        rate: images/s in steady state, from its first to its last labelled batch or chunk.
        first_labels: seconds from the start of its process to its first labelled batch or chunk.
        in_s3: whether it read from S3, and wrote there.
        failure: why it has none of these, else null.
        record: of our own run, `runs/<id>.json`.
        first_commit: of our own run, seconds from the start of its process to its first committed shard.
    """

    name: str
    images: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    first_labels: float = 0.0
    in_s3: bool = False
    failure: str | None = None
    record: dict[str, Any] | None = None
    first_commit: float | None = None


def not_installed(peer: str) -> list[Run]:
    """In place of the runs of a peer that lacks a package here: one that says so; else none."""
    package = PEERS[peer].package
    if importlib.util.find_spec(package) is not None:
        return []
    return [Run(peer, failure=f"not installed: pip install {package}")]


def prepare(subject: TrainingModel, dataset: Dataset, folder: Path, **settings: Any) -> Task:
    """What every contender gets; writes the model into `folder`."""
    save_checkpoint(subject.model, subject.preprocessor, folder / "model")
    return Task(
        tars=str(dataset.tars),
        files=str(dataset.files),
        extension=dataset.extension,
        model=str(folder / "model"),
        size=subject.preprocessor.size,
        output=str(folder / "output"),
        events=str(folder / "events"),
        **settings,
    )


@contextmanager
def in_local_s3(task: Task) -> Iterator[Task]:
    """The task with its tars in an S3 server on this machine, where its labels are to be written too.

    Raises:
        LocalS3Error: the server can't be started.
    """
    with LocalS3() as server:
        os.environ.update(server.environment())  # of this process, and of those that it starts
        server.create_bucket(_BUCKET)
        there = replace(task, tars=f"s3://{_BUCKET}/shards", output=f"s3://{_BUCKET}/labels")
        for path in sorted(Path(task.tars).iterdir()):
            with path.open("rb") as tar:
                Storage().write(f"{there.tars}/{path.name}", tar)
        yield there


def run_contender(name: str, task: Task, images: int, timeout: float) -> Run:
    """Runs a contender, and counts what it has labelled.

    Args:
        name: `OURS`, or of one of `PEERS`.
        task: its input and output; whatever lies at its output is removed, before and after.
        images: that there are, with keys from 0.
        timeout: in seconds; then it is ended.

    Raises:
        WrongCountError: it lost images, or has some twice.
    """
    _remove(task.output)
    Path(task.events).unlink(missing_ok=True)
    command = ["jobs.benchmarks.own_contender"] if name == OURS else ["jobs.benchmarks.peers", name]
    start = time.monotonic()
    seconds, failure = run_module(command, task, timeout)
    if failure is not None:
        return Run(name, failure=failure)
    check_labels(name, task.output, images)
    events = read_events(task)
    first_labels = next(at for at, count in events if count) - start
    in_s3 = task.tars.startswith("s3:")
    run = Run(name, images, seconds, steady_rate(name, events), first_labels, in_s3)
    if name == OURS:
        run = _with_record(run, task.output, events[0][0] - start)
    _remove(task.output)
    return run


def _with_record(run: Run, output: str, began: float) -> Run:
    """Our own run with its record, whose clock began `began` seconds after the process."""
    uri = next(i.uri for i in Storage().list(output) if "/runs/" in i.uri and i.uri.endswith(".json"))
    record = json.loads(Storage().read(uri))
    return replace(run, record=record, first_commit=began + record["seconds"]["first_commit"])


def _remove(output: str) -> None:
    """Removes a folder, here or in S3; there need be none."""
    if not output.startswith("s3:"):
        shutil.rmtree(output, ignore_errors=True)
        return
    for info in list(Storage().list(output)):
        Storage().delete(info.uri)


def run_module(command: list[str], task: Task, timeout: float) -> tuple[float, str | None]:
    """Runs a module with a task, in a process group of its own; returns seconds, and why it failed."""
    folder = Path(task.events).parent
    described, log = folder / "task.json", folder / "log"
    described.write_text(json.dumps(asdict(task)))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(Path(jobs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        ),
        "HF_HUB_OFFLINE": "1",
        # Nobody is told; and Ray leaves no token in the home folder.
        "RAY_USAGE_STATS_ENABLED": "0",
        "DAFT_ANALYTICS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    environment.pop("RAY_ADDRESS", None)
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, str(described)],
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return timeout, f"not done after {timeout:,.0f} s"
    if status != 0:
        lines = log.read_text(errors="replace").strip().splitlines() or [f"exit status {status}"]
        return time.monotonic() - start, lines[-1]
    return time.monotonic() - start, None


def check_labels(name: str, output: str, images: int) -> None:
    """Makes sure that the Parquet files, here or in S3, have each image once, with a label.

    Raises:
        WrongCountError: they don't.
    """
    folder = "/predictions/" if name == OURS else "/"
    keys: list[str] = []
    for info in Storage().list(output):
        if not info.uri.endswith(".parquet") or folder not in info.uri:
            continue
        table = pq.read_table(io.BytesIO(Storage().read(info.uri)), columns=["key", "label", "score"])
        unlabelled = table["label"].null_count + table["score"].null_count
        if unlabelled:
            raise WrongCountError(f"{name}: {info.uri} has images without a label")
        keys += (Path(key).stem for key in table["key"].to_pylist())
    expected = {f"{number:09d}" for number in range(images)}
    if len(keys) != images or set(keys) != expected:
        found = f"{len(keys):,} labels of {len(expected.intersection(keys)):,} images"
        raise WrongCountError(f"{name}: {found} came out, of {images:,} images")


def read_events(task: Task) -> list[tuple[float, int]]:
    """When images were labelled, and how many; processes may have written out of turn."""
    lines = [line.split() for line in Path(task.events).read_text().splitlines()]
    return sorted((float(at), int(images)) for images, at in lines)


def steady_rate(name: str, events: Sequence[tuple[float, int]]) -> float:
    """Images/s from the first labelled batch or chunk, without it, to the last.

    Raises:
        WrongCountError: all came out at once.
    """
    labelled = [(at, images) for at, images in events if images]
    seconds = labelled[-1][0] - labelled[0][0]
    if seconds <= 0:
        raise WrongCountError(f"{name}: too few images for a steady state: all came out at once")
    return sum(images for _, images in labelled[1:]) / seconds
