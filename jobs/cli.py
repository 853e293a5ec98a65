"""The command line `cvt-label`, which has every command of this package."""

import importlib
import sys
from typing import Annotated

import typer

from jobs.console import add_command, make_app
from pipeline.run import installed_version

COMMANDS = (
    "label", "plan", "stats", "report", "compare", "publish", "submit", "status", "logs", "stop", "schedule",
    "demo", "pack", "train", "convert", "verify", "config", "benchmark",
)  # fmt: skip


def make_cli(command: str | None = None) -> typer.Typer:
    """Returns the command line with one command, to import fewer modules, or by default with all."""
    app = make_app()
    app.callback()(_main)
    for name in [command] if command in COMMANDS else COMMANDS:
        if name == "benchmark":
            # Commands of this group import torch, which takes seconds: they are added only on demand.
            group = importlib.import_module("jobs.benchmarks.cli").app if name == command else make_app()
            group.callback()(_benchmark)
            app.add_typer(group, name=name)
        else:
            add_command(app, getattr(importlib.import_module(f"jobs.{name}"), name))
    return app


def main() -> None:
    """Runs `cvt-label`."""
    make_cli(sys.argv[1] if len(sys.argv) > 1 else None)()


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"cvt-label {installed_version('cvt-label')}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Label image datasets with CvT.

    Reads image shards from object storage. Writes Parquet labels and class statistics.
    """


def _benchmark() -> None:
    """Measure the throughput of labeling and of its parts."""


if __name__ == "__main__":
    main()
