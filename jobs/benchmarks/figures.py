"""What all benchmarks share: options, and figures as tables and as JSON."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from cvt.runtimes import Device
from jobs.console import stdout
from pipeline.run import installed_version

_PACKAGES = ("cvt-label", "torch", "torchvision", "transformers", "ray", "daft", "pyarrow", "pillow", "numpy")


def _resolve(device: Device) -> Device:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch finds no GPU")
    return device


def _check_folder(file: Path | None) -> Path | None:
    if file is not None and not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {file.parent}")
    return file


Images = Annotated[str, typer.Option("--images", help="Shards with images: a folder or a URI.")]
Model = Annotated[
    str, typer.Option("--model", help="cvt-13, cvt-21 or cvt-w24 (random weights), or as model.path.")
]
Size = Annotated[int | None, typer.Option(min=32, help="Pixels, with random weights (224).")]
OnDevice = Annotated[Device, typer.Option("--device", callback=_resolve)]
Rounds = Annotated[int, typer.Option(min=1, help="How often everything is measured, in turn.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a batch, everywhere.")]
Output = Annotated[Path | None, typer.Option(callback=_check_folder, help="File for the figures, as JSON.")]


class BenchmarkError(SystemExit):
    """Ends a benchmark with a message and status 1: a contender failed or lost images."""


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Returns the ratios of figures, round by round; one of both may have failed in the last rounds."""
    return [one / other for one, other in zip(ours, theirs, strict=False)]


def report(context: typer.Context, output: Path | None, **tables: Sequence[Any]) -> None:
    """Prints tables, and writes them as JSON with machine, versions and settings.

    Args:
        context: of the command, whose parameters are the settings.
        output: JSON file, or None.
        tables: by title, rows that are dataclasses or dictionaries with the same fields. A table shows a
            list of numbers as median, minimum and maximum, and leaves out fields without any value.
    """
    rows: dict[str, Any] = {}
    for title, table_rows in tables.items():
        rows[title] = found = [row if isinstance(row, dict) else vars(row) for row in table_rows]
        fields = [field for field in found[0] if any(row[field] not in (None, []) for row in found)]
        table = Table(*(field.replace("_", " ") for field in fields), title=title.replace("_", " "))
        for row in found:
            table.add_row(*(_cell(row[field]) for field in fields))
        stdout.print(table)
    if output is not None:
        versions = {name: installed_version(name) for name in _PACKAGES}
        header = {"machine": _machine(), "versions": versions, "settings": context.params}
        output.write_text(json.dumps(header | rows, indent=2, default=str) + "\n")


def _cell(value: Any) -> str:
    match value:
        case None | []:
            return "-"
        case [number]:
            return _cell(number)
        case [*numbers]:
            median, least, most = (_cell(f(numbers)) for f in (statistics.median, min, max))
            return f"{median} ({least} to {most})"
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
