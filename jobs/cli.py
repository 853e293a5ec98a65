"""The console command `cvt-label`: a thin layer over the modules beside it."""

from __future__ import annotations

import importlib
import sys

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


def main() -> None:
    """Runs `cvt-label`."""
    # Only the module of the command that is asked for: some take seconds to import.
    asked = sys.argv[1] if len(sys.argv) > 1 else None
    app = make_app()
    app.callback()(_describe)
    for name in [asked] if asked in COMMANDS else COMMANDS:
        if name == "benchmark":
            from jobs.benchmarks.cli import app as benchmarks

            app.add_typer(benchmarks, name=name)
        else:
            app.command(name)(getattr(importlib.import_module(f"jobs.{name}"), name))
    app()


def _describe() -> None:
    """Label image datasets with CvT: shards in object storage in, Parquet with statistics out."""


if __name__ == "__main__":
    main()
