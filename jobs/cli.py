"""The console command `cvt-label`: the commands of this package under one name."""

from __future__ import annotations

import importlib
import sys

import typer

from jobs.console import make_app

COMMANDS = (
    "label",
    "plan",
    "stats",
    "report",
    "compare",
    "publish",
    "submit",
    "status",
    "logs",
    "stop",
    "schedule",
    "demo",
    "train",
    "convert",
    "verify",
    "benchmark",
)


def make_cli(command: str | None = None) -> typer.Typer:
    """Returns the command line with all commands, or with one: some modules take seconds to import."""
    app = make_app()
    app.callback()(_describe)
    for name in [command] if command in COMMANDS else COMMANDS:
        if name == "benchmark":
            from jobs.benchmarks.cli import app as benchmarks

            app.add_typer(benchmarks, name=name)
        else:
            app.command(name)(getattr(importlib.import_module(f"jobs.{name}"), name))
    return app


def main() -> None:
    """Runs `cvt-label`."""
    make_cli(sys.argv[1] if len(sys.argv) > 1 else None)()


def _describe() -> None:
    """Label image datasets with CvT: shards in object storage in, Parquet with statistics out."""


if __name__ == "__main__":
    main()
