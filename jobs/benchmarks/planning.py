"""Planning and commit at scale, with simulated listings and results: `cvt-label benchmark planning`."""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from dataclasses import dataclass
from typing import Annotated, NamedTuple

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
from pipeline.run import State, plan
from pipeline.storage import ObjectInfo, Storage

_CLASSES, _CHUNK, _SHARD_CHUNKS = 1000, 512, 20
_ROOT = "bucket/dataset/train"


@dataclass(frozen=True)
class Figure:
    """What was measured of one thing; memory is resident, imports included, in MiB."""

    measured: str
    count: int
    seconds: float
    per_second: float
    peak_mib: float
    peak_mib_after_a_quarter: float | None = None


def planning(
    context: typer.Context,
    shards: Annotated[int, typer.Option(min=100, help="Shards of the manifest.")] = 10**6,
    rows: Annotated[int, typer.Option(min=10**4, help="Rows that are committed.")] = 4 * 10**6,
    output: figures.Output = None,
) -> None:
    """Measure planning against a large manifest, and how many rows per second the committer takes.

    A tenth of the listing is new, and a hundredth has changed. Rows are of a model with 1000 classes, in
    shards of 10,240, on one core. Each runs in a process of its own.

    Exit status: 0; 1 if shards or rows are missing in the end.
    """
    found = []
    for measure, count in ((measure_plan, shards), (measure_commit, rows)):
        with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(measure, (folder, count)))
    figures.report(context, output, planning_and_commit=found)


class _Shard(NamedTuple):
    """A simulated shard."""

    number: int

    @property
    def name(self) -> str:
        return f"{_ROOT}/part-{self.number // 1000:04d}/shard-{self.number:07d}.tar"

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"

    @property
    def prediction_file(self) -> str:
        return f"predictions/s3/{self.name}.parquet"

    def version(self, change: int = 0) -> str:
        return f"{self.number + change:032x}-{10**9 + self.number}"

    def manifest_row(self) -> ManifestRow:
        return ManifestRow(
            uri=self.uri,
            version=self.version(),
            format="webdataset",
            size=10**9 + self.number,
            rows=1000,
            errors=0,
            duplicate_keys=0,
            output=self.prediction_file,
            output_version=self.version(1),
            run="20260102T030405Z-012345",
        )


def measure_plan(folder: str, count: int) -> Figure:
    """Plans an input of `count` labeled shards, a hundredth of them changed, and a tenth more."""
    shards = [_Shard(number) for number in range(count + count // 10)]
    manifest = Manifest(Storage(), folder, _CLASSES)
    manifest.replace(lambda: (shard.manifest_row() for shard in shards[:count]))
    objects = (ObjectInfo(s.uri, 10**9 + s.number, s.version(0 if s.number % 100 else 7)) for s in shards)
    files = (ObjectInfo(f"{folder}/{s.prediction_file}", 10**5, s.version(1)) for s in shards[:count])
    start = time.perf_counter()
    entries = manifest.entries()
    unlisted, lost = reconcile(files, entries, folder)
    found = plan(ShardListing(objects, f"s3://{_ROOT}"), entries, LABEL_NEW)
    seconds = time.perf_counter() - start
    changed = -(-count // 100)
    expected = {State.NEW: count // 10, State.CHANGED: changed, State.DONE: count - changed, State.GONE: 0}
    if unlisted or lost or found.states != expected or len(found.shards) != count // 10 + changed:
        raise RuntimeError(f"the plan is wrong: {found.states}")
    return Figure("planning: shards listed", len(shards), seconds, len(shards) / seconds, _peak_mib())


def measure_commit(folder: str, rows: int) -> Figure:
    """Commits classified chunks on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)
    labels = tuple(f"class {i}" for i in range(_CLASSES))
    options = PredictionOptions(labels, topk=5, embedding="none", embedding_width=0)
    results = [_classified(seed, options) for seed in range(8)]
    simulated = [_Shard(number) for number in range(max(1, rows // (_CHUNK * _SHARD_CHUNKS)))]
    shards = [Shard(each.uri, each.version(), "webdataset", 10**9) for each in simulated]
    manifest = Manifest(Storage(), folder, _CLASSES)
    writer = ManifestWriter(manifest, interval=30)
    partition = Partition(Storage(), folder, labels)
    files = PredictionWriter(partition, "f" * 64, options, "run", {}, lambda shard: True)
    committer = Committer(files, shards, writer.add)
    early, start = None, time.perf_counter()
    with committer:
        for number in range(len(shards)):
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
        raise RuntimeError(f"{committer.totals.images} rows were committed, {written} are listed, of {count}")
    return Figure("commit: rows", count, seconds, count / seconds, _peak_mib(), early)


def _classified(seed: int, options: PredictionOptions) -> pa.Table:
    """Returns a chunk's rows as a classifier with random logits gives them."""
    generator = np.random.default_rng(seed)
    integers = {"target": (0, _CLASSES), "width": (300, 600), "height": (300, 600)}
    columns = {
        name: pa.array(generator.integers(*ends, _CHUNK), pa.int32()) for name, ends in integers.items()
    }
    keys, errors = [f"n{seed:08d}_{i:08d}" for i in range(_CHUNK)], pa.nulls(_CHUNK, pa.string())
    samples = pa.table({"key": keys, **columns, "error": errors})
    logits = generator.normal(0, 3, (_CHUNK, _CLASSES)).astype(np.float32)
    chunk = Chunk(0, 0, samples, pixels=np.zeros((_CHUNK, 1, 1, 3), np.uint8))
    return classify(chunk, lambda images: EngineOutput(logits, logits[:, :1]), options).samples


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
