"""Measures the pipeline against a bare loop and transformers' own: `cvt-label benchmark --images DIR`."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from jobs.console import Exit, err, exit_status, out, run_alone

if TYPE_CHECKING:
    from jobs.contenders import Measurement, Ratio


def benchmark(
    images: Annotated[str, typer.Option("--images", help="Shards with photographs: a folder or a URI.")],
    rounds: Annotated[int, typer.Option(min=1, help="Times that each way is measured.")] = 3,
    count: Annotated[int, typer.Option(min=1, help="Images for what runs on the model alone.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch, everywhere.")] = 32,
    size: Annotated[int, typer.Option(min=32, help="Input size of the CvT-13, in pixels.")] = 224,
    output: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
) -> None:
    """Measure pipeline, engine and decoding against a bare loop and transformers' own.

    The model is a CvT-13 with random weights. The pipeline labels all of the images, from where they
    lie to Parquet files; its steady state is from its first to its last results.

    Exit status: 0; 1 where a way lost images; 4 when the images can't be read.
    """
    from jobs import contenders  # takes seconds, which --help need not wait for

    with exit_status():
        subjects = contenders.load_subjects(images, count, batch_size, size)
    ways = (contenders.decoding, contenders.model, contenders.pipeline)
    try:
        measured = [m for way in ways for m in way(subjects, rounds)]
    except contenders.WrongCountError as error:
        err.print(f"cvt-label: {error}", markup=False)
        sys.exit(Exit.FAILED)
    ratios = contenders.ratios({m.name: m for m in measured})
    _print(measured, ratios)
    if output is not None:
        figures = {"measured": [asdict(m) for m in measured], "ratios": [asdict(r) for r in ratios]}
        output.write_text(json.dumps(figures, indent=2) + "\n")


def _print(measured: list[Measurement], ratios: list[Ratio]) -> None:
    table = Table("images/s", "images", "median", "least", "most")
    for m in measured:
        table.add_row(m.name, f"{m.images:,}", *_spread(m.rates))
    out.print(table)
    table = Table("ratio", "median", "least", "most")
    for r in ratios:
        table.add_row(r.name, *_spread(r.rounds))
    out.print(table)


def _spread(values: list[float]) -> list[str]:
    return [f"{value:,.2f}" for value in (statistics.median(values), min(values), max(values))]


if __name__ == "__main__":
    run_alone(benchmark)
