"""Shared parts of the benchmarks: options, rounds, tables and JSON output."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from torch.utils.collect_env import get_env_info

from cvt.runtimes import Device
from jobs.console import print_notice, print_table
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


DeviceOption = Annotated[Device, typer.Option("--device", callback=_resolve, help="Device of the model.")]
RoundsOption = Annotated[int, typer.Option(metavar="N", min=1, help="Measurements of each variant.")]
OutputOption = Annotated[
    Path | None, typer.Option(callback=_check_folder, metavar="FILE", help="JSON file for the results.")
]


class BenchmarkError(SystemExit):
    """A variant or contender failed or lost images. Ends the benchmark with exit status 1."""


def compare_rates(
    variants: Mapping[str, Callable[[T], Sized]], images: T, rounds: int, baseline: str
) -> list[dict[str, Any]]:
    """Measures variants in turn, after a warm-up round; a variant returns one result for each image.

    Returns:
        A row for each variant, with its images/s and their ratio to those of the baseline, by round.

    Raises:
        BenchmarkError: a variant lost an image.
    """
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for turn, (name, variant) in itertools.product(range(rounds + 1), variants.items()):
        print_notice(f"{name}: {f'round {turn} of {rounds}' if turn else 'warm-up'}")
        start = time.perf_counter()
        done = len(variant(images))
        if done != len(images):
            raise BenchmarkError(f"{name}: {done} of {len(images)} images were processed")
        if turn:
            rates[name].append(done / (time.perf_counter() - start))
    return [
        {"variant": name, "images_per_s": rate, "speedup": ratios(rate, rates[baseline])}
        for name, rate in rates.items()
    ]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Returns the ratio of two figures in each round that both have."""
    return [one / other for one, other in zip(ours, theirs, strict=False)]


def print_results(context: typer.Context, output: Path | None, **tables: Sequence[Mapping[str, Any]]) -> None:
    """Prints tables (`print_tables`), and writes them to a JSON file with machine and settings."""
    print_tables(**tables)
    if output is not None:
        write_results(output, describe_machine(context), **tables)


def print_tables(**tables: Sequence[Mapping[str, Any]]) -> None:
    """Prints tables by title.

    The rows of a table have the same fields. A table shows a list of numbers as median, minimum and maximum,
    and omits fields that are empty in all rows.
    """
    for title, rows in tables.items():
        fields = [field for field in rows[0] if any(row[field] not in (None, []) for row in rows)]
        first, *others = (field.replace("_", " ") for field in fields)
        cells = [[_cell(row[field]) for field in fields] for row in rows]
        print_table(title.replace("_", " "), [first], others, cells)


def describe_machine(context: typer.Context) -> dict[str, Any]:
    """Returns machine, versions and settings of a benchmark; takes seconds."""
    versions = {name: installed_version(name) for name in _PACKAGES}
    return {"machine": get_env_info()._asdict(), "versions": versions, "settings": context.params}


def write_results(output: Path, header: Mapping[str, Any], **tables: Sequence[Mapping[str, Any]]) -> None:
    """Writes tables and `describe_machine` to a JSON file, which it replaces at once."""
    partial = output.with_name(f".{output.name}.part")
    partial.write_text(json.dumps({**header, **tables}, indent=2, default=str) + "\n")
    partial.replace(output)


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
