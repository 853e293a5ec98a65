"""Shared parts of the benchmarks: options, rounds, tables and JSON output."""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.table import Table

from cvt.runtimes import Device
from jobs.console import print_notice, stdout
from pipeline.run import installed_version

T = TypeVar("T", bound=Sized)
_PACKAGES = ("cvt-label", "torch", "torchvision", "transformers", "ray", "daft", "pyarrow", "pillow", "numpy")


def _resolve(device: Device) -> Device:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch finds no GPU")
    return device


def _check_folder(file: Path | None) -> Path | None:
    if file is not None and not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"folder {file.parent} does not exist")
    return file


Images = Annotated[str, typer.Option(metavar="URI", help="Folder or URI of shards.")]
Model = Annotated[
    str,
    typer.Option(
        metavar="MODEL", help="cvt-13, cvt-21 or cvt-w24 with random weights, or any value of model.path."
    ),
]
Size = Annotated[
    int | None,
    typer.Option(metavar="N", min=32, help="Image size in pixels for random weights. Default: 224."),
]
DeviceOption = Annotated[Device, typer.Option("--device", callback=_resolve, help="Device of the model.")]
Rounds = Annotated[int, typer.Option(metavar="N", min=1, help="Number of measurements of each variant.")]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Number of images in a batch.")]
Output = Annotated[
    Path | None, typer.Option(callback=_check_folder, metavar="FILE", help="JSON file for the results.")
]


class BenchmarkError(SystemExit):
    """A variant or contender failed or lost images. Ends the benchmark with exit status 1."""


def measure_rates(
    variants: Mapping[str, Callable[[T], Iterable[Any]]], images: T, rounds: int
) -> dict[str, list[float]]:
    """Returns the images/s of each variant in each round, after a warm-up round.

    A variant returns one result for each image. Raises `BenchmarkError` if a variant lost an image.
    """
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for turn, (name, variant) in itertools.product(range(rounds + 1), variants.items()):
        print_notice(f"{name}: {f'round {turn} of {rounds}' if turn else 'warm-up'}")
        start = time.perf_counter()
        done = sum(1 for _ in variant(images))
        if done != len(images):
            raise BenchmarkError(f"{name}: {done} of {len(images)} images were processed")
        if turn:
            rates[name].append(done / (time.perf_counter() - start))
    return rates


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Returns the ratio of two figures in each round that both have."""
    return [one / other for one, other in zip(ours, theirs, strict=False)]


def print_results(context: typer.Context, output: Path | None, **tables: Sequence[Any]) -> None:
    """Prints tables, and writes them to a JSON file with machine, versions and settings.

    The rows of a table are dataclasses or dictionaries with the same fields. A table shows a list of numbers
    as median, minimum and maximum, and omits fields that are empty in all rows.
    """
    results: dict[str, Any] = {}
    for title, table_rows in tables.items():
        results[title] = rows = [row if isinstance(row, dict) else vars(row) for row in table_rows]
        fields = [field for field in rows[0] if any(row[field] not in (None, []) for row in rows)]
        table = Table(*(field.replace("_", " ") for field in fields), title=title.replace("_", " "))
        for row in rows:
            table.add_row(*(_cell(row[field]) for field in fields))
        stdout.print(table)
    if output is not None:
        versions = {name: installed_version(name) for name in _PACKAGES}
        header = {"machine": _machine(), "versions": versions, "settings": context.params}
        output.write_text(json.dumps(header | results, indent=2, default=str) + "\n")


def _cell(value: Any) -> str:
    match value:
        case None | []:
            return "-"
        case [number]:
            return _cell(number)
        case [*numbers]:
            median, low, high = (_cell(f(numbers)) for f in (statistics.median, min, max))
            return f"{median} ({low} to {high})"
        case float():
            return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:,.2f}"
        case int():
            return f"{value:,}"
    return str(value)


def _machine() -> dict[str, str | None]:
    cpuinfo, cpu = Path("/proc/cpuinfo"), platform.processor()
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"python": platform.python_version(), "system": platform.platform(), "cpu": cpu, "gpu": gpu}
