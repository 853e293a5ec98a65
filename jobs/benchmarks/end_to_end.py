"""Compares the whole job with other tools: `cvt-label benchmark run --images URI`."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import shutil
import statistics
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cvt.checkpoints import save_checkpoint
from cvt.preprocessing import Preprocessor
from cvt.runtimes import Precision
from jobs import console
from jobs.benchmarks import figures
from jobs.benchmarks.contenders import ENGINE, EXTENSION, PEERS, PIPELINE, Task, task_config
from jobs.benchmarks.runs import ContenderResult, run_contender
from jobs.reference import load_model, read_images

_SHARD_IMAGES = 8192
_SHARDS_PER_CORE = 2  # minimum


def run(
    context: typer.Context,
    images: console.ImagesOption,
    model: console.ModelOption = "cvt-13",
    size: console.SizeOption = None,
    count: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of images; images repeat if there are fewer.")
    ] = 2000,
    rounds: figures.RoundsOption = 3,
    batch_size: console.BatchSizeOption = 32,
    device: figures.DeviceOption = "auto",
    precision: Annotated[Precision, typer.Option(help="Precision of the model.")] = "fp32",
    peers: Annotated[
        str, typer.Option(metavar="NAMES", help="Comma-separated tools to compare with, or none.")
    ] = "ray,dataloader,daft",
    set: console.SetOption = None,
    price_per_hour: Annotated[
        float | None, typer.Option(metavar="N", min=0, help="Price of this machine, in any currency.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="N", min=1, help="Maximum duration of one run, in seconds.")
    ] = 3600,
    output: figures.OutputOption = None,
) -> None:
    """Compare the speed of the whole job with that of other tools.

    Each contender labels the same tars with the same weights in its own process: this pipeline, the engine
    alone, and the peers. The labels of each contender are counted. Rates are in steady state: from the first
    labeled batch to the last.

    More exit statuses: 1 if a contender lost images or this pipeline failed.
    """
    names = [] if peers == "none" else peers.split(",")
    if not PEERS.keys() >= {*names}:
        raise typer.BadParameter(f"choose from {', '.join(PEERS)}, or none", param_hint="--peers")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        checkpoint = load_model(model, size)
        task = Task(
            tars=f"{folder}/tars",
            files=f"{folder}/files",
            model=f"{folder}/model",
            size=checkpoint.preprocessor.size,
            output=f"{folder}/output",
            batch_size=batch_size,
            device=device,
            precision=precision,
            cores=cores,
            overrides=set or (),
        )
        task_config(task)  # checks the overrides before the first measurement
        save_checkpoint(checkpoint.to_transformers(), checkpoint.preprocessor, Path(task.model))
        console.print_notice("packing the images")
        make_dataset(images, Path(task.tars), checkpoint.preprocessor, count, cores)
        if "daft" in names:
            for tar in Path(task.tars).iterdir():
                shutil.unpack_archive(tar, task.files, filter="data")
        results = [ContenderResult(name) for name in (PIPELINE, ENGINE, *names)]
        for turn in range(1, rounds + 1):
            for result in results:
                if result.failure:
                    continue  # the contender would fail again
                console.print_notice(f"round {turn} of {rounds}: {result.contender}")
                attempt = replace(task, output=f"{task.output}-{result.contender.replace(' ', '-')}-{turn}")
                run_contender(result, attempt, count, timeout)
                if result.failure and result.contender == PIPELINE:
                    raise figures.BenchmarkError(f"the pipeline failed: {result.failure}")
        [record] = Path(f"{task.output}-{PIPELINE}-{rounds}").glob("model=*/runs/*.json")
        last_run = json.loads(record.read_text())
    for result in results:
        result.pipeline_speedup = figures.ratios(results[0].images_per_s, result.images_per_s)
        if price_per_hour is not None and result.images_per_s:
            result.cost_per_million = price_per_hour / 3600 / statistics.median(result.images_per_s) * 1e6
    figures.print_results(
        context,
        output,
        contenders=[vars(result) for result in results],
        stages_of_last_run=[_stage_row(*stage) for stage in last_run["stages"].items()],
        last_run=[{name: last_run[name] for name in ("bound_by", "decoder", "gpu_utilization")}],
        seconds_of_last_run=[last_run["timings"]],
    )


def make_dataset(uri: str, tars: Path, preprocessor: Preprocessor, count: int, cores: int) -> None:
    """Packs `count` encoded images of a dataset into tars.

    Images that cannot be decoded are omitted, because other contenders fail on them. Images are repeated if
    there are too few. Keys are numbers of nine digits, from 0.

    Raises:
        StorageError, NoShardsError: the images cannot be read, or no image can be decoded.
    """
    tars.mkdir()
    size = min(_SHARD_IMAGES, math.ceil(count / (_SHARDS_PER_CORE * cores)))
    images = itertools.chain.from_iterable(read_images(uri, preprocessor) for _ in itertools.count())
    for shard, start in enumerate(range(0, count, size)):
        with tarfile.open(tars / f"{shard:05d}.tar", "w") as tar:
            for number in range(start, min(start + size, count)):
                data, _ = next(images)
                member = tarfile.TarInfo(f"{number:09d}.{EXTENSION}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _stage_row(name: str, stage: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a stage of a run record its maximum rate: the images/s if the stage never waited."""
    rate = stage["images"] * stage["workers"] / stage["busy_s"] if stage["busy_s"] else None
    return {"stage": name, **stage, "images_per_s_busy": rate}
