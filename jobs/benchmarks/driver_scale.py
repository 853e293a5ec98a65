"""Sections of `cvt-label benchmark scale`: one driver with simulated classifiers, and planning.

Synthetic shards replace the storage of the input, and stored results replace model and decoder. Ray Data, the
committer, the prediction files and the manifest are real.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from cvt.preprocessing import Preprocessor
from jobs.benchmarks.sections import CheckError, Report, Row, memory_mb, run_as_section
from pipeline.classify import classify
from pipeline.commit import Committer, ManifestRow, ManifestWriter, Partition, PredictionWriter
from pipeline.config import ClassifyConfig, DecodeConfig, RayConfig, ReportConfig, Selection
from pipeline.dataflow import LOCAL, Resources, Stages
from pipeline.dataflow.ray_cluster import init_ray
from pipeline.dataflow.stages import Classifier, ReadStep
from pipeline.decode import DecodeOptions
from pipeline.decode.cpu import Decoded, decoded_chunk
from pipeline.predictions import PredictionOptions, serialize_table
from pipeline.read import Chunk, ReadOptions, Sample, Shard, ShardListing
from pipeline.read.chunks import sample_table
from pipeline.run import plan
from pipeline.statistics import CLASSIFY, DECODE, STORAGE, ClassStatistics, StageMetrics
from pipeline.storage import ObjectInfo, Storage

#: The shards of a photographic dataset: about a gigabyte.
CHUNKS_PER_SHARD, SHARD_BYTES = 8, 1_000_000_000
CLASSES, TOPK = 1000, 5
#: Chunks per second that the simulated classifiers offer together: more than a driver can take.
OFFERED_CHUNKS_PER_S = 100.0
#: Seconds until all simulated classifiers must work.
START_TIMEOUT_S = 150.0

LABELS = tuple(f"class {number}" for number in range(CLASSES))
PREDICTIONS = PredictionOptions(LABELS, TOPK, "none", 0)


def synthetic_shard(number: int) -> Shard:
    """Returns a tar that does not exist."""
    return Shard(f"s3://synthetic/train/{number:07d}.tar", f"etag-{number}", "webdataset", SHARD_BYTES)


def synthetic_chunk(shard: int, start: int, images: int, total: int | None) -> Chunk:
    """Returns a chunk of samples whose images are empty."""
    samples = [Sample(f"{start + i:09d}", b"", offset=512 * i, size=110_000) for i in range(images)]
    metrics = {STORAGE: StageMetrics(images)}
    size = SHARD_BYTES // CHUNKS_PER_SHARD
    return Chunk(shard, start, sample_table(samples), total, encoded_bytes=size, metrics=metrics)


def read_synthetic(images: int, shards: Iterable[tuple[int, Shard]]) -> Iterator[Chunk]:
    """Yields the chunks of synthetic shards, of `images` images each."""
    total = images * CHUNKS_PER_SHARD
    for number, _ in shards:
        for start in range(0, total, images):
            yield synthetic_chunk(number, start, images, total if start + images == total else None)


class _Outputs(NamedTuple):
    logits: np.ndarray
    embeddings: np.ndarray


class NullClassifier:
    """Takes the place of `Classifier`: returns stored results after the time that a model would take."""

    def __init__(self, stages: Stages, images: int, seconds: float) -> None:
        self.decode_options, self.timeout_s = stages.decode_options, stages.classify.timeout_s
        self._seconds = seconds
        chunk = synthetic_chunk(0, 0, images, None)
        decoded = [Decoded(None, 500, 375, None)] * images
        pixels = np.zeros((images, 1, 1, 3), np.uint8)
        self._results = classify(
            decoded_chunk(chunk, decoded, pixels, StageMetrics()), random_outputs, stages.predictions
        ).samples

    def __call__(self, chunk: Chunk) -> Chunk:
        """Returns the chunk with prediction columns. `retries` counts the chunks of this process."""
        time.sleep(self._seconds)
        samples = self._results.set_column(0, "key", chunk.samples["key"])
        metrics = {**chunk.metrics, CLASSIFY: StageMetrics(samples.num_rows), DECODE: StageMetrics()}
        return replace(
            chunk, samples=samples, pixels=None, metrics=metrics, retries={f"process {os.getpid()}": 1}
        )


def random_outputs(pixels: np.ndarray) -> Any:
    """Returns logits for images, as an engine does, but without importing PyTorch into each process."""
    logits = np.random.default_rng(0).normal(0, 3, (len(pixels), CLASSES)).astype(np.float32)
    return _Outputs(logits, np.zeros((len(pixels), 0), np.float32))


@dataclass(frozen=True)
class SyntheticStages(Stages):
    """The stages of the product with synthetic shards and simulated classifiers."""

    seconds: float = 0.0

    def make_read_step(self, resources: Resources) -> ReadStep:
        """Returns the reader of synthetic shards."""
        return partial(read_synthetic, resources.chunk_images)

    def make_classifier(self, resources: Resources) -> Classifier:
        """Returns a simulated classifier."""
        return cast(Classifier, NullClassifier(self, resources.chunk_images, self.seconds))

    @property
    def decode_options(self) -> DecodeOptions:
        """How empty images are decoded: to error rows."""
        return DecodeOptions(Preprocessor.published(), 10**9)


def measure_driver(settings: Row, report: Report) -> None:
    """Runs a labeling run with simulated classifiers for some seconds, and reports its rate.

    Settings: `classifiers`, `processes` (their maximum number; each has the same number of classifiers),
    `decode_tasks` (whether there are decode tasks), `chunk_images`, `seconds`.

    Raises:
        CheckError: an image has no row in the prediction files, or two.
    """
    from pipeline.dataflow.ray_executor import RayExecutor

    count, images = settings["classifiers"], settings["chunk_images"]
    processes = min(count, settings["processes"])
    concurrent = 2 * count // processes  # a classifier has two chunks at once
    stages = SyntheticStages(
        storage=Storage(),
        read_options=ReadOptions(),
        checkpoint=cast(Any, None),
        predictions=PREDICTIONS,
        precision="fp32",
        decode=DecodeConfig(),
        classify=ClassifyConfig(min_actors=processes, max_actors=processes, concurrent_chunks=concurrent),
        report=ReportConfig(gallery=0),
        seconds=2 * count / OFFERED_CHUNKS_PER_S,
    )
    resources = Resources(
        device="cpu",
        runtime="torch",
        chunk_images=images,
        batch_size=64,
        read_memory=1,
        readers=2,
        decode_cpus=0.25,
        decode_memory=1,
        decoders=2 if settings["decode_tasks"] else 0,
        classify_cpus=0.001,
        classify_gpus=1.0,
        min_actors=processes,
        initial_actors=processes,
        max_actors=processes,
        threads=1,
    )
    # Ray starts a worker for each CPU: few CPUs and many GPUs, which are only numbers to Ray.
    init_ray(
        LOCAL,
        num_cpus=2,
        num_gpus=processes,
        include_dashboard=False,
        object_store_memory=2 * 1024**3,
        log_to_driver=False,
    )
    shards = [synthetic_shard(number) for number in range(10_000)]
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        partition = Partition(Storage(), f"{folder}/model=null-00000000", LABELS)
        report(_run_driver(RayExecutor(RayConfig()), partition, shards, stages, resources, settings))


def _run_driver(
    executor: Any,
    partition: Partition,
    shards: Sequence[Shard],
    stages: SyntheticStages,
    resources: Resources,
    settings: Row,
) -> Row:
    writer = PredictionWriter(partition, "0" * 64, PREDICTIONS, "run", {}, lambda shard: True)
    manifest = ManifestWriter(partition.manifest, interval=10)
    started, opened, chunks_done = time.monotonic(), 0.0, 0
    marks: list[tuple[float, float, int]] = []  # time, CPU seconds and chunks at the start and at the end
    with (
        Committer(writer, shards, manifest.add) as committer,
        closing(executor.label(shards, stages, resources)) as chunks,
    ):
        for chunk in chunks:
            committer.add(chunk)
            chunks_done += 1
            now = time.monotonic()
            opened = opened or now
            is_started = len(committer.totals.retries) == resources.max_actors
            if not marks and (is_started or now > opened + START_TIMEOUT_S):
                marks.append((now, time.process_time(), chunks_done))
            if len(marks) == 1 and now > marks[0][0] + settings["seconds"]:
                marks.append((now, time.process_time(), chunks_done))
                committer.accepts_new_shards = False
            if len(marks) == 2 and not committer.open_shards:
                break
        committer.wait_for_writes()
        worked, done = len(committer.totals.retries), committer.totals.images
    manifest.flush()
    manifest.close()
    expected = committer.totals.shards * CHUNKS_PER_SHARD * resources.chunk_images
    rows = ds.dataset(f"{partition.uri}/predictions").count_rows()
    labeled = len(partition.manifest.labeled(["uri"]))
    if worked < resources.max_actors:
        raise CheckError(f"{worked} of {resources.max_actors} processes with classifiers worked")
    if not (rows == done == expected and labeled == committer.totals.shards):
        raise CheckError(
            f"{labeled:,} shards are labeled with {rows:,} rows; {committer.totals.shards:,} were committed "
            f"with {done:,} images, of {expected:,}"
        )
    (start, start_cpu, start_chunks), (end, end_cpu, end_chunks) = marks
    rate = (end_chunks - start_chunks) / (end - start)
    return {
        "classifiers": settings["classifiers"],
        "processes": resources.max_actors,
        "stages": 3 if settings["decode_tasks"] else 2,
        "start_s": round(opened - started, 1),
        "seconds": round(end - start, 1),
        "chunks": end_chunks - start_chunks,
        "chunks_per_s": round(rate, 1),
        "images_per_s": round(rate * resources.chunk_images),
        "driver_cpu_ms_per_chunk": round(1000 * (end_cpu - start_cpu) / (end_chunks - start_chunks), 1),
        "driver_busy": round((end_cpu - start_cpu) / (end - start), 2),
        "images_checked": rows,
    }


def measure_planning(settings: Row, report: Report) -> None:
    """Reports the time of each step of planning, and the peak memory of the process after the step.

    Settings: `shards`, the number of shards.

    Raises:
        CheckError: a plan does not have all shards, or has labeled ones.
    """
    count = settings["shards"]

    def objects() -> Iterator[ObjectInfo]:
        for number in range(count):
            shard = synthetic_shard(number)
            yield ObjectInfo(shard.uri, shard.size, shard.version)

    def listing() -> ShardListing:
        return ShardListing(objects(), "s3://synthetic/train")

    def timed(step: str, action: Callable[[], Any]) -> Any:
        start = time.monotonic()
        found = action()
        seconds = round(time.monotonic() - start, 2)
        report({"shards": count, "step": step, "seconds": seconds, "peak_memory_mb": memory_mb()})
        return found

    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        partition = Partition(Storage(), f"{folder}/model=null-00000000", LABELS)
        manifest, statistics = partition.manifest, shard_statistics()
        timed("imports", lambda: None)
        timed("list and group the objects", lambda: sum(1 for _ in listing()))
        first = timed("plan the first run", lambda: plan(listing(), {}, Selection()))
        if len(first.shards) != count:
            raise CheckError(f"the first plan has {len(first.shards):,} of {count:,} shards")
        from pipeline.dataflow.ray_executor import ShardSource

        source = ShardSource(first.shards, cast(Any, iter))
        timed("make the read tasks of Ray Data", partial(source.get_read_tasks, 1))
        del first, source
        rows = partial(_manifest_rows, count, statistics)
        timed("write the manifest", lambda: manifest.replace(rows))
        some = {row.uri: row for row in _manifest_rows(1000, statistics)}
        timed("update 1,000 rows of the manifest", lambda: manifest.update(some))
        entries = timed("read the manifest", manifest.entries)
        second = timed("plan a run with nothing new", lambda: plan(listing(), entries, Selection()))
        if second.shards or len(entries) != count:
            raise CheckError(f"{len(second.shards):,} of {len(entries):,} labeled shards are planned again")


def shard_statistics() -> bytes:
    """Returns the partial statistics of a synthetic shard with `CHUNKS_PER_SHARD` chunks of 1,024 images."""
    images = 1024
    samples = pa.table(
        {"key": [f"{i:09d}" for i in range(images)], "error": pa.nulls(images, pa.string())}
    ).append_column("target_id", pa.nulls(images, pa.int32()))
    chunk = Chunk(0, 0, samples, pixels=np.zeros((images, 1, 1, 3), np.uint8))
    labeled = pa.concat_tables([classify(chunk, random_outputs, PREDICTIONS).samples] * CHUNKS_PER_SHARD)
    return serialize_table(ClassStatistics.from_predictions(labeled, CLASSES).to_partial())


def _manifest_rows(count: int, statistics: bytes) -> Iterator[ManifestRow]:
    for number in range(count):
        shard = synthetic_shard(number)
        yield ManifestRow(
            shard.uri,
            version=shard.version,
            format=shard.format,
            size=shard.size,
            rows=1024 * CHUNKS_PER_SHARD,
            errors=0,
            duplicate_keys=0,
            unmatched_targets=0,
            output=f"predictions/s3/synthetic/train/{number:07d}.tar.parquet",
            output_version=f"etag-{number}-1000",
            run="run",
            statistics=statistics,
        )


if __name__ == "__main__":
    # Workers of Ray import the classes of this module by its name, which is not `__main__`.
    module = importlib.import_module("jobs.benchmarks.driver_scale")
    run_as_section({"driver": module.measure_driver, "planning": module.measure_planning})
