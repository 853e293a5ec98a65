"""Compares the whole job with other tools: `cvt-label benchmark run --images URI`."""

from __future__ import annotations

import io
import itertools
import math
import os
import statistics
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cvt.checkpoints import save_checkpoint
from cvt.preprocessing import Preprocessor
from cvt.runtimes import Precision
from jobs import console
from jobs.benchmarks import figures
from jobs.benchmarks.bucket import open_folder, upload
from jobs.benchmarks.contenders import (
    COMMANDS,
    ENGINE,
    EXTENSION,
    IN_PROCESS,
    PEERS,
    PIPELINE,
    Task,
    task_config,
)
from jobs.benchmarks.runs import ContenderResult, read_record, run_contender
from jobs.reference import load_model, read_images

_SHARD_IMAGES = 8192
_SHARDS_PER_CORE = 2  # minimum


def _parse_counts(text: str) -> list[int]:
    numbers = {int(number) if number.isdecimal() else 0 for number in text.split(",")}
    if 0 in numbers:
        raise typer.BadParameter(f"{text}: expected positive numbers, such as 100,1000")
    return sorted(numbers)


def _check_bucket(uri: str | None) -> str | None:
    if uri is not None and not uri.startswith("s3://"):
        raise typer.BadParameter("expected s3://BUCKET or s3://BUCKET/FOLDER, which all contenders can use")
    return uri


def run(
    context: typer.Context,
    images: console.ImagesOption,
    model: console.ModelOption = "cvt-13",
    size: console.SizeOption = None,
    count: Annotated[
        Any,
        typer.Option(
            metavar="N[,N]",
            parser=_parse_counts,
            help="Numbers of images; each is a job of its own. Images repeat if there are fewer.",
        ),
    ] = "2000",
    rounds: figures.RoundsOption = 3,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of images in a batch. Default: that of cvt-label, and for the others 32, or 256 for "
            "images of less than 64 pixels.",
        ),
    ] = None,
    device: figures.DeviceOption = "auto",
    precision: Annotated[Precision, typer.Option(help="Precision of the model.")] = "fp32",
    peers: Annotated[
        str, typer.Option(metavar="NAMES", help="Comma-separated tools to compare with, or none.")
    ] = "ray,dataloader,daft",
    bucket: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            callback=_check_bucket,
            help="S3 bucket or folder for images and labels, which are deleted at the end. Default: a local "
            "S3 server.",
        ),
    ] = None,
    set: console.SetOption = None,
    price_per_hour: Annotated[
        float | None, typer.Option(metavar="N", min=0, help="Price of this machine, in any currency.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="N", min=1, help="Maximum duration of one run, in seconds.")
    ] = 3600,
    output: figures.OutputOption = None,
) -> None:
    """Compare the whole job with other tools.

    Each contender reads the same images from S3, labels them with the same weights in its own process, and
    writes the labels to S3: cvt-label on Ray and in one process, its engine alone, and the peers. The labels
    of each contender are counted. Rates are in steady state: from the first labeled batch to the last.

    More exit statuses: 1 if a contender lost images or cvt-label failed.
    """
    names = [] if peers == "none" else peers.split(",")
    if not PEERS.keys() >= {*names}:
        raise typer.BadParameter(f"choose from {', '.join(PEERS)}, or none", param_hint="--peers")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name, ExitStack() as stack:
        folder, checkpoint = Path(name), load_model(model, size)
        task = Task(
            tars="s3://benchmark/tars",  # of each attempt, see below
            files="",
            model=f"{folder}/model",
            size=checkpoint.preprocessor.size,
            output="s3://benchmark/labels",
            local="",
            batch_size=batch_size,
            device=device,
            precision=precision,
            cores=cores,
            overrides=set or (),
        )
        task_config(task)  # checks the overrides before the first measurement
        save_checkpoint(checkpoint.to_transformers(), checkpoint.preprocessor, Path(task.model))
        console.print_notice("packing the images")
        for number in count:  # before the environment selects the local S3 server
            make_dataset(images, folder / f"{number}", checkpoint.preprocessor, number, cores)
        root = stack.enter_context(open_folder(bucket))
        for number in count:
            upload(folder / f"{number}", f"{root}/{number}", with_files="daft" in names)
        results = [ContenderResult(each, number) for number in count for each in (*COMMANDS, *names)]
        results.append(ContenderResult(ENGINE, count[-1]))
        for turn, result in itertools.product(range(1, rounds + 1), results):
            if result.failure:
                continue  # the contender would fail again
            console.print_notice(f"round {turn} of {rounds}: {result.contender}, {result.images:,} images")
            job, attempt = f"{root}/{result.images}", _attempt(result.contender, turn)
            own = replace(task, tars=f"{job}/tars", files=f"{job}/files", output=f"{job}/{attempt}")
            run_contender(result, replace(own, local=f"{folder}/{result.images}-{attempt}"), timeout)
            if result.failure and result.contender in COMMANDS:
                raise figures.BenchmarkError(f"{result.contender} failed: {result.failure}")
        last_run = read_record(f"{root}/{count[-1]}/{_attempt(PIPELINE, rounds)}")
    _add_ratios(results, price_per_hour)
    figures.print_results(
        context,
        output,
        contenders=[vars(result) for result in results],
        stages_of_last_run=[_stage_row(*stage) for stage in last_run["stages"].items()],
        last_run=[{name: last_run[name] for name in ("bound_by", "decoder", "gpu_utilization")}],
        seconds_of_last_run=[last_run["timings"]],
    )


def _attempt(contender: str, turn: int) -> str:
    """Returns the name of a folder for the labels of a contender."""
    return f"{contender.replace(' ', '-')}-{turn}"


def _add_ratios(results: Sequence[ContenderResult], price_per_hour: float | None) -> None:
    """Adds to each result its ratios to cvt-label for the same number of images, and its cost."""
    for result in results:
        by_name = {each.contender: each for each in results if each.images == result.images}
        if result.contender != ENGINE:
            result.seconds_ratio = figures.ratios(result.seconds, by_name[PIPELINE].seconds)
            result.seconds_ratio_in_process = figures.ratios(result.seconds, by_name[IN_PROCESS].seconds)
        if len(result.images_per_s) < len(result.seconds):
            result.images_per_s = []  # too few images for a steady state
        result.pipeline_speedup = figures.ratios(by_name[PIPELINE].images_per_s, result.images_per_s)
        if price_per_hour is not None and result.images_per_s:
            result.cost_per_million = price_per_hour / 3600 / statistics.median(result.images_per_s) * 1e6


def make_dataset(uri: str, tars: Path, preprocessor: Preprocessor, count: int, cores: int) -> None:
    """Packs `count` encoded images of a dataset into tars.

    Images that cannot be decoded are omitted, because other contenders fail on them. Images are repeated if
    there are too few. Keys are numbers of nine digits, from 0.

    Raises:
        StorageError, NoShardsError: the images cannot be read, or no image can be decoded.
    """
    images = itertools.chain.from_iterable(read_images(uri, preprocessor) for _ in itertools.count())
    pack_images((data for data, _ in images), tars, count, cores)


def pack_images(images: Iterator[bytes], tars: Path, count: int, cores: int) -> None:
    """Packs the first `count` encoded images into tars, see `make_dataset`."""
    tars.mkdir()
    size = min(_SHARD_IMAGES, math.ceil(count / (_SHARDS_PER_CORE * cores)))
    for shard, start in enumerate(range(0, count, size)):
        with tarfile.open(tars / f"{shard:05d}.tar", "w") as tar:
            for number in range(start, min(start + size, count)):
                data = next(images)
                member = tarfile.TarInfo(f"{number:09d}.{EXTENSION}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _stage_row(name: str, stage: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a stage of a run record its maximum rate: the images/s if the stage never waited."""
    rate = stage["images"] * stage["workers"] / stage["busy_s"] if stage["busy_s"] else None
    return {"stage": name, **stage, "images_per_s_busy": rate}
