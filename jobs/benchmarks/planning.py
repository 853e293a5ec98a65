"""Measures planning and commits at scale, with simulated data: `cvt-label benchmark planning`."""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
import typer

from cvt.inference import EngineOutput
from jobs.benchmarks import figures
from pipeline.classify import classify
from pipeline.commit import (
    Committer,
    Manifest,
    ManifestRow,
    ManifestWriter,
    Partition,
    PredictionWriter,
    reconcile,
)
from pipeline.config import LABEL_NEW
from pipeline.predictions import PredictionOptions
from pipeline.read import Chunk, Shard, ShardListing
from pipeline.run import ShardState, plan
from pipeline.storage import ObjectInfo, Storage

_CLASSES, _CHUNK, _SHARD_CHUNKS = 1000, 512, 20
_ROOT, _SIZE = "bucket/dataset/train", 10**9


@dataclass(frozen=True)
class Measurement:
    """The result of one measurement. Memory is the resident set of the process, in MiB."""

    measured: str
    count: int
    seconds: float
    per_second: float
    peak_mib: float
    peak_mib_after_a_quarter: float | None = None


def planning(
    context: typer.Context,
    shards: Annotated[int, typer.Option(metavar="N", min=100, help="Number of shards in the manifest.")] = 10
    ** 6,
    rows: Annotated[int, typer.Option(metavar="N", min=10**4, help="Number of rows to commit.")] = 4 * 10**6,
    output: figures.Output = None,
) -> None:
    """Measure the speed of planning and of commits.

    Plans a run against a large manifest: a tenth of the listing is new, and a hundredth has changed. Commits
    rows of a model with 1,000 classes on one core, in shards of 10,240 rows. Each measurement runs in its own
    process.

    Exit status: 0 on success; 1 if the plan is wrong or rows are missing.
    """
    found = []
    for measure, count in ((measure_plan, shards), (measure_commit, rows)):
        with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(measure, (folder, count)))
    figures.print_results(context, output, planning_and_commit=found)


def _name(number: int) -> str:
    return f"{_ROOT}/part-{number // 1000:04d}/shard-{number:07d}.tar"


def _version(number: int, change: int = 0) -> str:
    return f"{number + change:032x}-{_SIZE}"


def _row(number: int) -> ManifestRow:
    return ManifestRow(
        uri=f"s3://{_name(number)}",
        version=_version(number),
        format="webdataset",
        size=_SIZE,
        rows=1000,
        errors=0,
        duplicate_keys=0,
        output=f"predictions/s3/{_name(number)}.parquet",
        output_version=_version(number, 1),
        run="20260102T030405Z-012345",
    )


def measure_plan(folder: str, count: int) -> Measurement:
    """Plans an input of `count` labeled shards (1 % changed) and 10 % new shards."""
    listed = range(count + count // 10)
    manifest = Manifest(Storage(), folder, _CLASSES)
    manifest.replace(lambda: map(_row, range(count)))
    objects = (ObjectInfo(f"s3://{_name(n)}", _SIZE, _version(n, 0 if n % 100 else 7)) for n in listed)
    outputs = f"{folder}/predictions/s3"
    files = (ObjectInfo(f"{outputs}/{_name(n)}.parquet", 10**5, _version(n, 1)) for n in range(count))
    start = time.perf_counter()
    entries = manifest.entries()
    unlisted, lost = reconcile(files, entries, folder)
    found = plan(ShardListing(objects, f"s3://{_ROOT}"), entries, LABEL_NEW)
    seconds = time.perf_counter() - start
    changed = -(-count // 100)
    expected = {
        ShardState.NEW: count // 10,
        ShardState.CHANGED: changed,
        ShardState.DONE: count - changed,
        ShardState.DELETED: 0,
    }
    if unlisted or lost or found.states != expected or len(found.shards) != count // 10 + changed:
        raise RuntimeError(f"the plan is wrong: {found.states}")
    return Measurement("planning: shards listed", len(listed), seconds, len(listed) / seconds, _peak_mib())


def measure_commit(folder: str, rows: int) -> Measurement:
    """Commits `rows` rows of classified chunks on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)
    labels = tuple(f"class {i}" for i in range(_CLASSES))
    options = PredictionOptions(labels, topk=5, embedding="none", embedding_width=0)
    results = [_classified(seed, options) for seed in range(8)]
    numbers = range(max(1, rows // (_CHUNK * _SHARD_CHUNKS)))
    shards = [Shard(f"s3://{_name(n)}", _version(n), "webdataset", _SIZE) for n in numbers]
    manifest = Manifest(Storage(), folder, _CLASSES)
    writer = ManifestWriter(manifest, interval=30)
    partition = Partition(Storage(), folder, labels)
    files = PredictionWriter(partition, "f" * 64, options, "run", {}, lambda shard: True)
    committer = Committer(files, shards, writer.add)
    early, start = None, time.perf_counter()
    with committer:
        for number in numbers:
            for part in range(_SHARD_CHUNKS):
                total = _SHARD_CHUNKS * _CHUNK if part == _SHARD_CHUNKS - 1 else None
                samples = results[(number + part) % len(results)]
                committer.add(Chunk(number, part * _CHUNK, samples, total=total))
            if number == len(shards) // 4:
                early = _peak_mib()
        committer.finish()
    writer.flush()
    seconds = time.perf_counter() - start
    writer.close()
    count = len(shards) * _SHARD_CHUNKS * _CHUNK
    written = sum(manifest.read(["rows"])["rows"].to_pylist())
    if (committer.totals.images, written) != (count, count):
        raise RuntimeError(
            f"expected {count} rows, committed {committer.totals.images}, in the manifest {written}"
        )
    return Measurement("commit: rows", count, seconds, count / seconds, _peak_mib(), early)


def _classified(seed: int, options: PredictionOptions) -> pa.Table:
    """Returns the rows of a chunk, classified with random logits."""
    generator = np.random.default_rng(seed)
    integers = {"target": (0, _CLASSES), "width": (300, 600), "height": (300, 600)}
    columns = {
        name: pa.array(generator.integers(*ends, _CHUNK), pa.int32()) for name, ends in integers.items()
    }
    keys, none = [f"n{seed:08d}_{i:08d}" for i in range(_CHUNK)], pa.nulls(_CHUNK, pa.string())
    samples = pa.table({"key": keys, **columns, "unmatched": none, "error": none})
    logits = generator.normal(0, 3, (_CHUNK, _CLASSES)).astype(np.float32)
    chunk = Chunk(0, 0, samples, pixels=np.zeros((_CHUNK, 1, 1, 3), np.uint8))
    return classify(chunk, lambda images: EngineOutput(logits, logits[:, :1]), options).samples


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
