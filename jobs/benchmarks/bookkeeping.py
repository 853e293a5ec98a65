"""Measures planning and commit at scale, with simulated listings and results: `cvt-label bookkeeping`."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer
from rich.table import Table

from cvt.inference import EngineOutput
from jobs.console import out, run_alone
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

_CLASSES = 1000

_CHUNK = 512

_ROOT = "s3://bucket/dataset/train"

_MIB = 1024**2


@dataclass(frozen=True)
class Figure:
    """What was measured of one thing.

    Attributes:
        name: the thing.
        count: shards or rows that were checked to have come out.
        seconds: it took.
        rate: `count` a second.
        peak_mib: largest memory of its process (resident), with everything that it imports.
        early_peak_mib: likewise, after a quarter of the work.
    """

    name: str
    count: int
    seconds: float
    rate: float
    peak_mib: float
    early_peak_mib: float | None = None


def bookkeeping(
    shards: Annotated[int, typer.Option(min=100, help="Shards of the manifest.")] = 10**6,
    rows: Annotated[int, typer.Option(min=10**4, help="Rows that are committed.")] = 4 * 10**6,
    output: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
) -> None:
    """Measure planning against a large manifest, and how many rows a second the committer takes.

    A tenth of the listing is new, and a hundredth has changed. Rows are of a model with 1000 classes, in
    shards of 10,240, on one core. Each runs in a process of its own.

    Exit status: 0; 1 where something is missing in the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        _write_manifest(folder, shards)
        figures = [_apart(_plan, folder, shards), _apart(_commit, folder, rows)]
    table = Table("", "count", "seconds", "a second", "peak MiB", "after a quarter")
    for f in figures:
        cells = [f"{f.count:,}", f"{f.seconds:.1f}", f"{f.rate:,.0f}", f"{f.peak_mib:,.0f}"]
        table.add_row(f.name, *cells, "" if f.early_peak_mib is None else f"{f.early_peak_mib:,.0f}")
    out.print(table)
    if output is not None:
        output.write_text(json.dumps([asdict(figure) for figure in figures], indent=2) + "\n")


def _apart(measure: Callable[..., Figure], *arguments: Any) -> Figure:
    """Runs a measurement in a fresh process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def _uri(number: int) -> str:
    return f"{_ROOT}/part-{number // 1000:04d}/shard-{number:07d}.tar"


def _output(number: int) -> str:
    return f"predictions/s3/{_uri(number)[5:]}.parquet"


def _version(number: int) -> str:
    return f"{number:032x}-{10**9 + number}"


def _write_manifest(folder: str, shards: int) -> None:
    def rows() -> Iterator[ManifestRow]:
        for number in range(shards):
            yield ManifestRow(
                uri=_uri(number),
                version=_version(number),
                format="webdataset",
                size=10**9 + number,
                rows=1000,
                errors=0,
                duplicate_keys=0,
                output=_output(number),
                output_version=_version(number + 1),
                run="20260102T030405Z-012345",
            )

    Manifest(Storage(), folder, _CLASSES).replace(rows)


def _plan(folder: str, shards: int) -> Figure:
    def objects() -> Iterator[ObjectInfo]:
        for number in range(shards + shards // 10):
            version = _version(number) if number % 100 else _version(number + 7)
            yield ObjectInfo(_uri(number), 10**9 + number, version)

    def files() -> Iterator[ObjectInfo]:
        for number in range(shards):
            yield ObjectInfo(f"{folder}/{_output(number)}", 10**5, _version(number + 1))

    start = time.perf_counter()
    known = Manifest(Storage(), folder, _CLASSES).entries()
    unlisted, lost = reconcile(files(), known, folder)
    work = plan(ShardListing(objects(), _ROOT), known, LABEL_NEW)
    seconds = time.perf_counter() - start
    changed = -(-shards // 100)
    expected = {State.NEW: shards // 10, State.CHANGED: changed, State.DONE: shards - changed, State.GONE: 0}
    if unlisted or lost or work.states != expected or len(work.shards) != shards // 10 + changed:
        raise RuntimeError(f"the plan is wrong: {work.states}")
    count = sum(work.states.values())
    return Figure("planning: shards listed", count, seconds, count / seconds, _peak_mib())


def _commit(folder: str, rows: int) -> Figure:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)
    chunks_a_shard = 20
    shards = max(1, rows // (_CHUNK * chunks_a_shard))
    labels = [f"class {i}" for i in range(_CLASSES)]
    options = PredictionOptions(labels, topk=5, embedding="none", embedding_width=0)
    results = [_result(seed, options) for seed in range(8)]
    plan = [Shard(_uri(number), _version(number), "webdataset", 10**9) for number in range(shards)]
    manifest = Manifest(Storage(), f"{folder}/committed", _CLASSES)
    writer = ManifestWriter(manifest, interval=30)
    partition = Partition(Storage(), f"{folder}/committed", options.labels)
    files = PredictionWriter(partition, "f" * 64, options, "run", {}, lambda shard: True)
    committer = Committer(files, plan, writer.add)
    early = None
    start = time.perf_counter()
    with committer:
        for number in range(shards):
            for part in range(chunks_a_shard):
                last = chunks_a_shard * _CHUNK if part == chunks_a_shard - 1 else None
                samples = results[(number + part) % len(results)]
                committer.add(Chunk(number, part * _CHUNK, samples, total=last))
            if number == shards // 4:
                early = _peak_mib()
        committer.finish()
    writer.flush()
    seconds = time.perf_counter() - start
    writer.close()
    count = shards * chunks_a_shard * _CHUNK
    written = sum(manifest.read(["rows"])["rows"].to_pylist())
    if (committer.totals.images, written) != (count, count):
        raise RuntimeError(f"{committer.totals.images} rows were committed, {written} are listed, of {count}")
    return Figure("commit: rows", count, seconds, count / seconds, _peak_mib(), early)


def _result(seed: int, options: PredictionOptions) -> pa.Table:
    """A chunk's rows, as they come from a classifier."""
    generator = np.random.default_rng(seed)
    samples = pa.table(
        {
            "key": [f"n{seed:08d}_{i:08d}" for i in range(_CHUNK)],
            "target": pa.array(generator.integers(0, _CLASSES, _CHUNK), pa.int32()),
            "width": pa.array(generator.integers(300, 600, _CHUNK), pa.int32()),
            "height": pa.array(generator.integers(300, 600, _CHUNK), pa.int32()),
            "error": pa.nulls(_CHUNK, pa.string()),
        }
    )
    pixels = np.zeros((_CHUNK, 1, 1, 3), np.uint8)
    return classify(Chunk(0, 0, samples, pixels=pixels), _Random(generator), options).samples


class _Random:
    """A model that knows nothing."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def __call__(self, images: np.ndarray) -> EngineOutput:
        logits = self._generator.normal(0, 3, (len(images), _CLASSES)).astype(np.float32)
        return EngineOutput(logits, logits[:, :1])


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MIB


if __name__ == "__main__":
    run_alone(bookkeeping)
