"""Writes the report of a partition: `cvt-label report URI`."""

from typing import Annotated

import typer

from jobs import console
from pipeline import write_report


def report(
    uri: console.PartitionArgument = None,
    config: console.JobConfigOption = None,
    set: console.SetOption = None,
    run: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Run to report. Default: the last run that labeled a shard."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="LABELS", help="Labels to compare with, as in `compare`. Repeatable."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Path or URI. Default: report.html in the partition."
        ),
    ] = None,
) -> None:
    """Write the HTML report of a partition from its stored labels.

    With --against, the report also compares the labels with those of other models or runs.
    """
    partition = console.resolve_partition(uri, config, set)
    console.print_line(f"report written to {write_report(partition, run, against or (), output)}")
