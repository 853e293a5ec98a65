"""Measures the whole job against others that do the same: `cvt-label benchmark --images URI`."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cvt.runtimes import Device, Precision
from jobs.benchmarks.report import print_decoding, print_figures, summary
from jobs.console import (
    Exit,
    SetOption,
    check_folder_of,
    err,
    exit_status,
    found_device,
    run_alone,
)
from pipeline.dataflow import sigterm_interrupts
from pipeline.run import installed_version

if TYPE_CHECKING:
    from jobs.benchmarks.contenders import Run
    from jobs.benchmarks.data import Dataset
    from jobs.benchmarks.decoding import Decoding
    from jobs.benchmarks.peers import Task


_PACKAGES = (
    "cvt-label", "torch", "torchvision", "transformers", "ray", "daft", "pyarrow", "pillow", "numpy"
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Attributes:
        images: shards.
        model: a published variant, with random weights, or a checkpoint.
        size: of the images of a model with random weights, in pixels.
        samples: images; None takes each once.
        rounds: times that each contender is measured.
        peers: that the pipeline is compared with.
        from_s3: whether the pipeline reads from an S3 server, and writes there.
        batch_size: images in a batch, everywhere.
        device: "cpu" or "cuda".
        precision: as `cvt.runtimes` has it.
        cores: CPUs of this machine.
        overrides: of the pipeline's configuration.
        price_per_hour: of this machine.
        timeout: of a run, in seconds.
    """

    images: str
    model: str
    size: int | None
    samples: int | None
    rounds: int
    peers: tuple[str, ...]
    from_s3: bool
    batch_size: int
    device: str
    precision: Precision
    cores: int
    overrides: tuple[str, ...]
    price_per_hour: float | None
    timeout: float


def benchmark(
    images: Annotated[str, typer.Option("--images", help="Shards with images: a folder or a URI.")],
    model: Annotated[
        str,
        typer.Option("--model", help="cvt-13, cvt-21 or cvt-w24 (random weights), or as model.path."),
    ] = "cvt-13",
    size: Annotated[
        int | None, typer.Option(min=32, help="With random weights: of the model's images (224).")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Images; repeated if there are fewer (each once).")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is measured, in turn.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch, everywhere.")] = 32,
    device: Annotated[Device, typer.Option("--device")] = "auto",
    precision: Annotated[Precision, typer.Option("--precision")] = "fp32",
    peers: Annotated[
        str, typer.Option("--peers", help="Of ray, dataloader and daft, with commas; or none.")
    ] = "ray,dataloader,daft",
    from_s3: Annotated[
        bool,
        typer.Option(
            "--from-s3",
            help="The pipeline reads from an S3 server on this machine, and writes there; the others read "
            "local files.",
        ),
    ] = False,
    set: SetOption = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of this machine; prints what a million images cost.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a run is ended.")] = 3600,
    decode_only: Annotated[
        bool, typer.Option("--decode-only", help="Only decoding, against transformers' processor.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
) -> None:
    """Measure the whole job, from shards to Parquet, against its stages alone and against others.

    Everyone labels the same tars with the same weights, in a process of its own, in turn; labels are
    counted. Rates are in steady state: from the first labelled batch to the last.

    Exit status: 0; 1 where one lost images, or our own run failed; 2 when an option can't be used; 4
    when images, model or S3 server can't.
    """
    check_folder_of(output)
    options = Options(
        images=images,
        model=model,
        size=size,
        samples=samples,
        rounds=rounds,
        peers=_asked(peers),
        from_s3=from_s3,
        batch_size=batch_size,
        device=found_device(device),
        precision=precision,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        overrides=tuple(set or ()),
        price_per_hour=price_per_hour,
        timeout=timeout,
    )
    figures: dict[str, Any] = {
        "machine": _machine(options.device),
        "versions": _versions(),
        "settings": asdict(options),
    }
    with _failures_told():
        if decode_only:
            decoding = _measure_decoding(options)
            figures["decoding"] = [asdict(one) for one in decoding]
        else:
            figures |= _measure(options)
    if output is not None:
        output.write_text(json.dumps(figures, indent=2) + "\n")
    if decode_only:
        print_decoding(decoding)
    else:
        print_figures(figures)


def _asked(peers: str) -> tuple[str, ...]:
    """The names in `--peers`."""
    from jobs.benchmarks.peers import PEERS

    names = () if peers == "none" else tuple(name.strip() for name in peers.split(","))
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: not one of {', '.join(PEERS)}, none")
    return names


@contextmanager
def _failures_told() -> Iterator[None]:
    """Ends the process with a message and a status where there are no figures."""
    from jobs.benchmarks.contenders import ContenderError, WrongCountError
    from jobs.local_s3 import LocalS3Error

    try:
        with exit_status(), sigterm_interrupts():
            yield
    except (WrongCountError, ContenderError, LocalS3Error) as error:
        err.print(f"cvt-label: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(Exit.UNUSABLE if isinstance(error, LocalS3Error) else Exit.FAILED)


def _measure(options: Options) -> dict[str, Any]:
    """The figures of the whole job."""
    from jobs.benchmarks import contenders, own_contender
    from jobs.benchmarks import data as benchmark_data

    subject = benchmark_data.load_subject(options.model, options.size)
    with tempfile.TemporaryDirectory(prefix="cvt-label-benchmark-") as temporary:
        folder = Path(temporary)
        _note("packing the images")
        dataset = benchmark_data.make_dataset(options.images, folder, options.samples, options.cores)
        task = contenders.prepare(
            subject,
            dataset,
            folder,
            batch_size=options.batch_size,
            device=options.device,
            precision=options.precision,
            cores=options.cores,
            overrides=options.overrides,
        )
        own_contender.task_config(task)  # an override that can't be used is told now
        with contenders.in_local_s3(task) if options.from_s3 else nullcontext(task) as ours:
            alone, runs = _measure_rounds(options, dataset, ours, task)
    return summary(dataset, alone, runs, options.price_per_hour)


def _measure_rounds(
    options: Options, dataset: Dataset, ours: Task, theirs: Task
) -> tuple[list[dict[str, float]], dict[str, list[Run]]]:
    """The stages' rates alone, and the contenders' runs; both a round each."""
    from jobs.benchmarks.alone import measure_alone
    from jobs.benchmarks.contenders import OURS, ContenderError, not_installed, run_contender

    runs: dict[str, list[Run]] = {OURS: []} | {name: not_installed(name) for name in options.peers}
    if "daft" in options.peers and not runs["daft"]:
        _note("unpacking the images, for Daft")
        dataset.unpack()
    alone = []
    for turn in range(1, options.rounds + 1):
        _note(f"round {turn} of {options.rounds}: each stage alone")
        alone.append(measure_alone(ours, options.timeout))
        for name, before in runs.items():
            if before and before[-1].failure:
                continue  # it would fail again
            _note(f"round {turn} of {options.rounds}: {name}")
            task = ours if name == OURS else theirs
            run = run_contender(name, task, dataset.images, options.timeout)
            if run.failure and name == OURS:
                raise ContenderError(f"the pipeline failed: {run.failure}")
            before.append(run)
    return alone, runs


def _measure_decoding(options: Options) -> list[Decoding]:
    """The figures of decoding alone."""
    from jobs.benchmarks import data as benchmark_data
    from jobs.benchmarks import decoding as benchmark_decoding

    subject = benchmark_data.load_subject(options.model, options.size)
    encoded = benchmark_decoding.take_images(options.images, subject.preprocessor, options.samples)
    return benchmark_decoding.compare_decoding(encoded, subject, options.device, options.rounds, _note)


def _note(message: str) -> None:
    err.print(message, markup=False, highlight=False)


def _machine(device: str) -> dict[str, Any]:
    import torch

    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"cpu": cpu, "system": platform.platform(), "gpu": gpu}


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {name: installed_version(name) for name in _PACKAGES}


if __name__ == "__main__":
    run_alone(benchmark)
