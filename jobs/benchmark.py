"""Measures the whole job against others that do the same: `cvt-label benchmark --images URI`."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from jobs.console import (
    Exit,
    Precision,
    SetOption,
    check_folder_of,
    err,
    exit_status,
    found_device,
    out,
    run_alone,
)
from pipeline.record import installed_version

if TYPE_CHECKING:
    from jobs.alone import Decoding
    from jobs.contenders import Dataset, Run

_PACKAGES = (
    "cvt-label", "torch", "torchvision", "transformers", "ray", "daft", "pyarrow", "pillow", "numpy"
)  # fmt: skip


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
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device")] = "auto",
    precision: Annotated[Precision, typer.Option("--precision")] = Precision.FP32,
    peers: Annotated[
        str, typer.Option("--peers", help="Of ray, dataloader and daft, with commas; or none.")
    ] = "ray,dataloader,daft",
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
    when images or model can't.
    """
    from jobs import contenders  # takes seconds, which --help need not wait for
    from jobs.peers import PEERS

    asked = [] if peers == "none" else [name.strip() for name in peers.split(",")]
    unknown = [name for name in asked if name not in PEERS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: not one of ray, dataloader, daft, none")
    device = found_device(device)
    check_folder_of(output)
    settings = {
        "batch_size": batch_size,
        "device": device,
        "precision": str(precision),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "overrides": tuple(set or ()),
    }
    figures: dict[str, Any] = {
        "machine": _machine(device),
        "versions": _versions(),
        "settings": settings | {"images": images, "model": model, "size": size, "rounds": rounds},
    }
    try:
        with exit_status():
            if decode_only:
                decoding = _measure_decoding(images, model, size, samples, rounds)
                figures["decoding"] = [asdict(one) for one in decoding]
            else:
                measured = _measure(images, model, size, samples, rounds, asked, settings, timeout)
                figures |= summary(*measured, price_per_hour)
    except (contenders.WrongCountError, contenders.ContenderError) as error:
        err.print(f"cvt-label: {error}", markup=False, highlight=False)
        sys.exit(Exit.FAILED)
    if output is not None:
        output.write_text(json.dumps(figures, indent=2) + "\n")
    if decode_only:
        _print_decoding(decoding)
    else:
        _print(figures)


def _measure(
    images: str,
    model: str,
    size: int | None,
    samples: int | None,
    rounds: int,
    peers: list[str],
    settings: dict[str, Any],
    timeout: float,
) -> tuple[Dataset, list[dict[str, float]], dict[str, list[Run]]]:
    """The data, the stages' rates alone, and the contenders' runs; both a round each."""
    from jobs import contenders
    from jobs.alone import measure_alone

    subject = contenders.load_subject(model, size)
    with tempfile.TemporaryDirectory(prefix="cvt-label-benchmark-") as temporary:
        folder = Path(temporary)
        _note("packing the images")
        dataset = contenders.make_dataset(images, folder, samples, settings["cores"])
        task = contenders.prepare(subject, dataset, folder, **settings)
        contenders.task_config(task)  # an override that can't be used is told now
        missing = {peer: contenders.missing_package(peer) for peer in peers}
        runs: dict[str, list[Run]] = {name: [] for name in (contenders.OURS, *peers)}
        if "daft" in peers and not missing["daft"]:
            _note("unpacking the images, for Daft")
            dataset.unpack()
        alone = []
        for turn in range(1, rounds + 1):
            _note(f"round {turn} of {rounds}: each stage alone")
            alone.append(measure_alone(task, timeout))
            for name in runs:
                if package := missing.get(name):
                    run = contenders.Run(name, failure=f"not installed: pip install {package}")
                elif runs[name] and runs[name][-1].failure:
                    continue  # it would fail again
                else:
                    _note(f"round {turn} of {rounds}: {name}")
                    run = contenders.run_contender(name, task, dataset.images, timeout)
                if run.failure and name == contenders.OURS:
                    raise contenders.ContenderError(f"the pipeline failed: {run.failure}")
                runs[name].append(run)
    return dataset, alone, runs


def _note(message: str) -> None:
    err.print(message, markup=False, highlight=False)


def summary(
    dataset: Dataset,
    alone: list[dict[str, float]],
    runs: Mapping[str, list[Run]],
    price_per_hour: float | None,
) -> dict[str, Any]:
    """All figures of a benchmark, as its JSON holds them.

    Args:
        dataset: what was labelled.
        alone: images/s of each stage alone, a round each.
        runs: of each contender, ours first; of one that failed, the last one says why.
        price_per_hour: of the machine, in any currency.
    """
    from jobs.contenders import OURS
    from jobs.peers import PEERS

    ours = runs[OURS]
    contenders = {}
    for name, all_runs in runs.items():
        failure = all_runs[-1].failure
        done = [run for run in all_runs if run.failure is None]
        rates = [run.rate for run in done]
        rate = statistics.median(rates) if done and failure is None else None
        contenders[name] = {
            "name": PEERS[name][1] if name in PEERS else "this pipeline",
            "failure": failure,
            "images": dataset.images if done else 0,
            "seconds": [run.seconds for run in done],
            "rates": rates,
            "rate": rate,
            "ratios": [mine.rate / run.rate for mine, run in zip(ours, done, strict=False)],
            "cost_per_million": None if rate is None else cost_per_million(price_per_hour, rate),
        }
    slowest = [min(rates.values()) for rates in alone]
    records = [run.record or {} for run in ours]
    return {
        "data": {name: value for name, value in asdict(dataset).items() if name not in ("tars", "files")},
        "price_per_hour": price_per_hour,
        "alone": alone,
        "contenders": contenders,
        "of_engine": [run.rate / rates["engine"] for run, rates in zip(ours, alone, strict=True)],
        "of_slowest_stage": [run.rate / rate for run, rate in zip(ours, slowest, strict=True)],
        "stages": [record.get("stages") for record in records],
        "bound_by": [record.get("bound_by") for record in records],
        "timings": [record.get("seconds") for record in records],
    }


def cost_per_million(price_per_hour: float | None, rate: float) -> float | None:
    """What labelling a million images costs at `rate` images/s; None without a price."""
    return None if price_per_hour is None else price_per_hour / (rate * 3600) * 1e6


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


def _print(figures: Mapping[str, Any]) -> None:
    data, priced = figures["data"], figures["price_per_hour"] is not None
    repeated = f" ({data['distinct']:,} of them different)" if data["distinct"] < data["images"] else ""
    left_out = f"; {data['left_out']:,} that can't be decoded are left out" if data["left_out"] else ""
    megabytes = f"{data['bytes'] / 1e6:,.0f} MB"
    _say(f"{data['images']:,} images{repeated} in {data['shards']:,} tars, {megabytes}{left_out}")
    headings = ["whole job", "images", "s in all", "images/s", "least", "most", "ours to theirs"]
    table = Table(*headings, *(["a million costs"] if priced else []))
    for one in figures["contenders"].values():
        if one["rate"] is None:
            table.add_row(one["name"], one["failure"])
            continue
        cells = [f"{one['images']:,}", f"{statistics.median(one['seconds']):,.1f}", *_spread(one["rates"])]
        cells += [f"{statistics.median(one['ratios']):.2f}"]
        table.add_row(one["name"], *cells, *([f"{one['cost_per_million']:,.2f}"] if priced else []))
    out.print(table)
    table = Table("stage alone", "images/s", "least", "most")
    for stage in figures["alone"][0]:
        table.add_row(stage, *_spread([rates[stage] for rates in figures["alone"]]))
    out.print(table)
    _say(
        f"end to end to the engine alone: {_ratio(figures['of_engine'])}; "
        f"to the slowest stage alone: {_ratio(figures['of_slowest_stage'])}"
    )
    stages = figures["stages"][-1]
    if stages:
        _print_stages(stages)
    if figures["bound_by"][-1]:
        _say(f"bound by: {figures['bound_by'][-1]}")


def _print_stages(stages: Mapping[str, Mapping[str, Any]]) -> None:
    """What the last run's record says of each stage."""
    headings = (
        "stage in the last run",
        "images",
        "busy s",
        "wait s",
        "MB",
        "workers",
        "busy",
        "images/s busy",
    )
    table = Table(*headings)
    for name, stage in stages.items():
        busy = stage["busy_s"]
        table.add_row(
            name,
            f"{stage['images']:,}",
            f"{busy:,.1f}",
            f"{stage['wait_s']:,.1f}",
            f"{stage['bytes'] / 1e6:,.0f}",
            f"{stage['workers']:g}",
            f"{stage['share_busy']:.0%}",
            f"{stage['images'] * stage['workers'] / busy:,.1f}" if busy else "-",
        )
    out.print(table)


def _measure_decoding(
    images: str, model: str, size: int | None, samples: int | None, rounds: int
) -> list[Decoding]:
    """Measures decoding alone."""
    from jobs import alone, contenders

    preprocessor = contenders.load_subject(model, size).preprocessor
    encoded = alone.take_images(images, preprocessor, samples)
    return alone.compare_decoding(encoded, preprocessor, rounds, _note)


def _print_decoding(measured: list[Decoding]) -> None:
    table = Table("images", "", "decoded, on one thread, by", "images/s", "least", "most", "ratio")
    for one in measured:
        table.add_row(
            f"{one.count:,}", one.images, one.way, *_spread(one.rates), f"{statistics.median(one.ratios):.2f}"
        )
    out.print(table)


def _ratio(values: list[float]) -> str:
    median, least, most = _spread(values)
    return f"{median} ({least} to {most})"


def _spread(values: list[float]) -> list[str]:
    return [f"{value:,.2f}" for value in (statistics.median(values), min(values), max(values))]


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    run_alone(benchmark)
