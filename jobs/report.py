"""Makes the report of a partition again: `python -m jobs.report URI`, or `cvt-label report URI`."""

from typing import Annotated

import typer

from jobs import console
from pipeline import write_report


@console.exit_on_error()
def report(
    uri: console.PartitionArgument = None,
    config: console.PartitionConfigOption = None,
    set: console.SetOption = None,
    run: Annotated[
        str | None,
        typer.Option("--run", help="The run that the report is about (the last one that labeled)."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="Labels to compare with, as in `compare`. May be repeated."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Path or URI (report.html next to the labels).")
    ] = None,
) -> None:
    """Make the report of a partition from what is stored, also against the labels of other models or runs.

    Exit status: 0; 2 when the configuration can't be used; 4 when labels can't be read, or the report can't
    be written.
    """
    written = write_report(console.resolve_partition(uri, config, set), run, against or (), output)
    console.print_line(f"{written}: written")


if __name__ == "__main__":
    console.run_command(report)
