"""What the benchmarks measure: their images and models, and whole runs of the pipeline and its peers.

A contender is a process of its own, from its start to its end, so that threads, memory and Ray are its own;
its labels are counted, and its speed comes from the times at which they were made.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

import jobs
from cvt.modeling import CvtForImageClassification
from cvt.preprocessing import Preprocessor
from cvt.presets import PRESETS, preset_config, preset_preprocessor
from jobs.peers import PEERS, Task
from pipeline.config import Config, ConfigError, InputConfig, load_config
from pipeline.decoding import FORMATS, decode
from pipeline.labelling import NoShardsError, input_shards, run_labelling
from pipeline.model_files import open_checkpoint
from pipeline.partition import read_options
from pipeline.reading import read_samples
from pipeline.storage import Storage
from pipeline.training import Subject, save_model

#: The contender that the others are compared with.
OURS = "pipeline"

_MAX_PIXELS = 10**9
_SHARD_IMAGES = 1000  # at the most
_SHARDS_A_CORE = 4  # at the least, so that work can be spread evenly
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WebP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}


class WrongCountError(RuntimeError):
    """Something lost images, or made some up: then its speed is none."""


def random_subject(name: str, size: int) -> Subject:
    """A published variant with random weights, for images of `size` pixels.

    Raises:
        ConfigError: there is no such variant.
    """
    if name not in PRESETS:
        raise ConfigError(f"--model: {name!r} is none of {', '.join(PRESETS)}")
    torch.manual_seed(0)
    labels = {i: f"class {i}" for i in range(1000)}
    model = CvtForImageClassification(preset_config(name, id2label=labels)).eval()
    return Subject(model, preset_preprocessor(size))


def load_subject(model: str, size: int | None) -> Subject:
    """A published variant with random weights, or a checkpoint as `model.path` takes them.

    Raises:
        ConfigError: a size is given for a checkpoint, which has its own.
        CheckpointError, StorageError: the checkpoint can't be loaded.
    """
    if model in PRESETS:
        return random_subject(model, size or 224)
    if size is not None:
        raise ConfigError(f"--size: is for {', '.join(PRESETS)}; {model} has a size of its own")
    checkpoint = open_checkpoint(Storage(), model)
    return Subject(checkpoint.model, checkpoint.preprocessor)


def load_images(uri: str, preprocessor: Preprocessor, count: int) -> np.ndarray:
    """The first images at `uri`, decoded: uint8 (count, size, size, 3); fewer, if there are fewer.

    Raises:
        StorageError, NoShardsError: they can't be read.
    """
    encoded = itertools.islice(read_images(uri), count)
    decoded = [decode(data, preprocessor, _MAX_PIXELS).pixels for data in encoded]
    return np.stack([pixels for pixels in decoded if pixels is not None])


def read_images(uri: str) -> Iterator[bytes]:
    """The encoded images of shards, in their order; samples without one are passed over."""
    section = InputConfig(uri=uri, labels=False)
    storage = Storage()
    for shard in input_shards(storage, section):
        for sample in read_samples(storage, shard, read_options(section, [])):
            if sample.image is not None:
                yield sample.image


# Data --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """The input of every contender.

    Attributes:
        tars: folder with the shards.
        files: folder with the same images in files of their own; empty unless `unpack` was called.
        images: how many; their keys are the numbers from 0, with nine digits.
        shards: tars that hold them.
        bytes: of the encoded images, in all.
        distinct: how many there were, before they were repeated.
        left_out: images of the source that can't be decoded.
        extension: of every image.
    """

    tars: Path
    files: Path
    images: int
    shards: int
    bytes: int
    distinct: int
    left_out: int
    extension: str

    def unpack(self) -> None:
        """Writes the images into files of their own."""
        self.files.mkdir(exist_ok=True)
        for path in sorted(self.tars.iterdir()):
            with tarfile.open(path) as tar:
                tar.extractall(self.files, filter="data")


def make_dataset(uri: str, folder: Path, samples: int | None, cores: int) -> Dataset:
    """Packs the images at `uri`, whatever format their shards have, as tars of an equal number of images.

    Their bytes stay as they are. What can't be decoded is left out: peers stop at it.

    Args:
        uri: shards.
        folder: for the tars; it exists.
        samples: images to take, over and over if there are fewer; None takes each once.
        cores: CPUs among which the shards are to be spread.

    Raises:
        StorageError, NoShardsError: the images can't be read, or there are none.
    """
    preprocessor = preset_preprocessor(224)
    bad: set[int] = set()
    total = 0
    extension = ""
    for total, data in enumerate(read_images(uri), 1):
        if decode(data, preprocessor, _MAX_PIXELS).pixels is None:
            bad.add(total - 1)
        elif not extension:
            # One for all, since some readers make a column of each; they go by the bytes.
            extension = next(_EXTENSIONS[name] for name, start, _ in FORMATS if start.match(data))
        if samples is not None and total - len(bad) == samples:
            break
    good = total - len(bad)
    if good == 0:
        raise NoShardsError(f"{uri}: no image that can be decoded")
    wanted = samples or good
    shards = min(wanted, max(math.ceil(wanted / _SHARD_IMAGES), _SHARDS_A_CORE * cores))
    tars = folder / "tars"
    tars.mkdir()
    images = enumerate(itertools.islice(_repeated(uri, bad), wanted))
    size = 0
    for shard in range(shards):
        count = wanted * (shard + 1) // shards - wanted * shard // shards
        with tarfile.open(tars / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, data in itertools.islice(images, count):
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                size += len(data)
    return Dataset(tars, folder / "files", wanted, shards, size, min(good, wanted), len(bad), extension)


def _repeated(uri: str, bad: set[int]) -> Iterator[bytes]:
    while True:
        yield from (data for number, data in enumerate(read_images(uri)) if number not in bad)


# Runs --------------------------------------------------------------------------------------------


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
        failure: why it has none of these, else null.
        record: of our own run, `runs/<id>.json`.
    """

    name: str
    images: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    failure: str | None = None
    record: dict[str, Any] | None = None


def missing_package(peer: str) -> str | None:
    """The package that a peer lacks here."""
    package = PEERS[peer][2]
    return package if importlib.util.find_spec(package) is None else None


def prepare(subject: Subject, dataset: Dataset, folder: Path, **settings: Any) -> Task:
    """What every contender gets; writes the model into `folder`."""
    save_model(subject, folder / "model")
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
    output, events = Path(task.output), Path(task.events)
    shutil.rmtree(output, ignore_errors=True)
    events.unlink(missing_ok=True)
    command = ["jobs.contenders"] if name == OURS else ["jobs.peers", name]
    seconds, failure = run_module(command, task, timeout)
    if failure is not None:
        return Run(name, failure=failure)
    check_labels(name, output, images)
    record = None
    if name == OURS:
        record = json.loads(next(output.glob("*/runs/*.json")).read_text())
    shutil.rmtree(output)
    return Run(name, images, seconds, steady_rate(name, events), record=record)


def run_module(command: list[str], task: Task, timeout: float) -> tuple[float, str | None]:
    """Runs a module with a task, in a process group of its own; returns seconds, and why it failed."""
    folder = Path(task.output).parent
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


def check_labels(name: str, output: Path, images: int) -> None:
    """Makes sure that the Parquet files have each image once, with a label.

    Raises:
        WrongCountError: they don't.
    """
    files = sorted(output.glob("*/predictions/**/*.parquet") if name == OURS else output.rglob("*.parquet"))
    keys: list[str] = []
    for path in files:
        table = pq.read_table(path, columns=["key", "label", "score"], partitioning=None)
        unlabelled = table["label"].null_count + table["score"].null_count
        if unlabelled:
            raise WrongCountError(f"{name}: {path.name} has images without a label")
        keys += (Path(key).stem for key in table["key"].to_pylist())
    expected = {f"{number:09d}" for number in range(images)}
    if len(keys) != images or set(keys) != expected:
        found = f"{len(keys):,} labels of {len(expected.intersection(keys)):,} images"
        raise WrongCountError(f"{name}: {found} came out, of {images:,} images")


def steady_rate(name: str, events: Path) -> float:
    """Images/s from the first labelled batch or chunk, without it, to the last.

    Raises:
        WrongCountError: all came out at once.
    """
    lines = [line.split() for line in events.read_text().splitlines()]
    labelled = sorted((float(at), int(images)) for images, at in lines)
    labelled = [(at, images) for at, images in labelled if images]
    seconds = labelled[-1][0] - labelled[0][0]
    if seconds <= 0:
        raise WrongCountError(f"{name}: too few images for a steady state: all came out at once")
    return sum(images for _, images in labelled[1:]) / seconds


def task_config(task: Task) -> Config:
    """The pipeline's configuration for a task.

    Raises:
        ConfigError: an override can't be used.
    """
    settings = {
        "input.uri": task.tars,
        "input.labels": "false",
        "model.path": task.model,
        "model.precision": task.precision,
        "output.uri": task.output,
        "classify.device": task.device,
        "classify.batch_size": str(task.batch_size),
    }
    return load_config(Config, None, [f"{n}={v}" for n, v in settings.items()] + list(task.overrides))


def label(task: Task) -> None:
    """Our own contender: the whole job, as `cvt-label label` runs it."""
    done = 0

    def note(progress: Any, plan: Any) -> None:
        nonlocal done
        if progress.images > done:
            task.labelled(progress.images - done)
            done = progress.images

    run_labelling(task_config(task), note)


if __name__ == "__main__":
    label(Task.read(sys.argv[1]))
