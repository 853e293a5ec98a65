"""The whole job against others that do the same: `cvt-label benchmark run --images URI`."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cvt.checkpoints import save_checkpoint
from cvt.runtimes import Precision
from jobs.benchmarks import figures
from jobs.benchmarks.contenders import OURS, PEERS, Task, task_config
from jobs.benchmarks.inputs import make_dataset, unpack
from jobs.benchmarks.runs import Run, in_local_s3, run_contender
from jobs.benchmarks.stages import measure_alone
from jobs.console import SetOption, check_folder_of, exit_status, found_device
from jobs.verify import load_model
from pipeline.dataflow import sigterm_interrupts


@dataclass(frozen=True)
class WholeJob:
    """The figures of one contender; lists have one value per round, times are from the start of its process.

    Attributes:
        images_per_s: in steady state.
        ours_to_theirs: images/s of this pipeline over those of the contender.
        cost_per_million: cost of a million images, in the currency of the price.
        failure: why a round has no figures.
    """

    contender: str
    seconds: list[float]
    first_labels_s: list[float]
    first_commit_s: list[float]
    images_per_s: list[float]
    ours_to_theirs: list[float]
    cost_per_million: float | None
    failure: str | None


@dataclass(frozen=True)
class StageAlone:
    """Images/s of a stage that has the machine to itself, and the whole job's over them, per round."""

    stage: str
    images_per_s: list[float]
    whole_job_to_stage: list[float]


def run(
    context: typer.Context,
    images: figures.Images,
    model: figures.Model = "cvt-13",
    size: figures.Size = None,
    samples: Annotated[int, typer.Option(min=1, help="Images; repeated if there are fewer.")] = 2000,
    rounds: figures.Rounds = 3,
    batch_size: figures.BatchSize = 32,
    device: figures.OnDevice = "auto",
    precision: Annotated[Precision, typer.Option("--precision")] = "fp32",
    peers: Annotated[
        str, typer.Option("--peers", help="Of ray, dataloader and daft, with commas; or none.")
    ] = "ray,dataloader,daft",
    from_s3: Annotated[
        bool, typer.Option("--from-s3", help="This pipeline uses an S3 server on this machine.")
    ] = False,
    set: SetOption = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Price of this machine.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a run is ended.")] = 3600,
    output: figures.Output = None,
) -> None:
    """Measure the whole job, from shards to Parquet, against its stages alone and against others.

    Each contender labels the same tars with the same weights in a process of its own, and its labels are
    counted. Rates are in steady state: from the first labeled batch to the last.

    Exit status: 0; 1 if a contender lost images or this pipeline failed; 2 if an option is wrong; 4 if
    images, model or S3 server cannot be used.
    """
    check_folder_of(output)
    names = [] if peers == "none" else [name.strip() for name in peers.split(",")]
    if unknown := [name for name in names if name not in PEERS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: not one of {', '.join(PEERS)}, none")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with exit_status(), sigterm_interrupts(), tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        checkpoint = load_model(model, size)
        task = Task(
            tars=f"{folder}/tars",
            files=f"{folder}/files",
            model=f"{folder}/model",
            size=checkpoint.preprocessor.size,
            output=f"{folder}/output",
            events=f"{folder}/events",
            batch_size=batch_size,
            device=found_device(device),
            precision=precision,
            cores=cores,
            overrides=tuple(set or ()),
        )
        task_config(task)  # refuses a wrong override before anything is measured
        save_checkpoint(checkpoint.model, checkpoint.preprocessor, Path(task.model))
        figures.note("packing the images")
        dataset = make_dataset(images, Path(task.tars), checkpoint.preprocessor, samples, cores)
        if "daft" in names:
            unpack(Path(task.tars), Path(task.files))
        alone = []
        runs: dict[str, list[Run]] = {name: [] for name in (OURS, *names)}
        with in_local_s3(task) if from_s3 else nullcontext(task) as ours:
            for turn in range(1, rounds + 1):
                figures.note(f"round {turn} of {rounds}: each stage alone")
                alone.append(measure_alone(ours, timeout))
                for name, before in runs.items():
                    if before and before[-1].failure:
                        continue  # it would fail again
                    figures.note(f"round {turn} of {rounds}: {name}")
                    each = run_contender(name, ours if name == OURS else task, dataset.images, timeout)
                    if each.failure and name == OURS:
                        raise figures.BenchmarkError(f"the pipeline failed: {each.failure}")
                    before.append(each)
    record = runs[OURS][-1].record
    figures.report(
        context,
        output,
        data=[dataset],
        whole_jobs=compare_contenders(runs, price_per_hour),
        stages_alone=compare_stages(alone, [each.rate for each in runs[OURS]]),
        stages_of_the_last_run=[_stage_row(name, stage) for name, stage in record["stages"].items()],
        last_run=[{name: record[name] for name in ("bound_by", "decoder", "gpu_utilisation")}],
    )


def compare_contenders(runs: Mapping[str, Sequence[Run]], price_per_hour: float | None) -> list[WholeJob]:
    """Compares contenders round by round; the last run of a contender may have failed."""
    found = []
    for name, theirs in runs.items():
        done = [run for run in theirs if run.failure is None]
        rates, cost = [run.rate for run in done], None
        if price_per_hour is not None and rates:
            cost = price_per_hour / (statistics.median(rates) * 3600) * 1e6
        found.append(
            WholeJob(
                contender=name,
                seconds=[run.seconds for run in done],
                first_labels_s=[run.first_labels for run in done],
                first_commit_s=[run.first_commit for run in done if run.first_commit is not None],
                images_per_s=rates,
                ours_to_theirs=[ours.rate / rate for ours, rate in zip(runs[OURS], rates, strict=False)],
                cost_per_million=cost,
                failure=theirs[-1].failure,
            )
        )
    return found


def compare_stages(alone: Sequence[Mapping[str, float]], whole: Sequence[float]) -> list[StageAlone]:
    """Compares images/s of the whole job with those of each stage, and of the slowest, round by round."""
    by_stage = {stage: [rates[stage] for rates in alone] for stage in alone[0]}
    by_stage["slowest"] = [min(rates.values()) for rates in alone]
    return [
        StageAlone(stage, rates, [job / rate for job, rate in zip(whole, rates, strict=True)])
        for stage, rates in by_stage.items()
    ]


def _stage_row(name: str, stage: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a stage of a run record the images/s that it would reach if it never waited."""
    rate = stage["images"] * stage["workers"] / stage["busy_s"] if stage["busy_s"] else None
    return {"stage": name, **stage, "images_per_s_busy": rate}
