"""The console command `cvt-label`: the commands of this package under one name."""

import importlib
import sys

import typer

from jobs.console import make_app

COMMANDS = (
    "label", "plan", "stats", "report", "compare", "publish", "submit", "status", "logs", "stop", "schedule",
    "demo", "train", "convert", "verify", "config", "benchmark",
)  # fmt: skip


def make_cli(command: str | None = None) -> typer.Typer:
    """Returns the command line with all commands, or with one: some modules take seconds to import."""
    app = make_app()
    app.callback()(_describe)
    for name in [command] if command in COMMANDS else COMMANDS:
        if name == "benchmark":
            # A group. Its commands take seconds to import, so it has them only if it is asked for.
            group = importlib.import_module("jobs.benchmarks.cli").app if name == command else make_app()
            group.callback()(_describe_benchmark)
            app.add_typer(group, name=name)
        else:
            app.command(name)(getattr(importlib.import_module(f"jobs.{name}"), name))
    return app


def main() -> None:
    """Runs `cvt-label`."""
    make_cli(sys.argv[1] if len(sys.argv) > 1 else None)()


def _describe() -> None:
    """Label image datasets with CvT: shards in object storage in, Parquet with statistics out."""


def _describe_benchmark() -> None:
    """Measure labeling, decoding and the model against other ways to do the same."""


if __name__ == "__main__":
    main()
