"""The command line `cvt-label`, which has every command of this package.

Importing a command takes about a second, so only the command that runs is imported, and for `--help` none.
"""

import ast
import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline import __version__

COMMANDS = (
    "label", "plan", "stats", "report", "compare", "publish", "submit", "status", "logs", "stop", "schedule",
    "metrics", "demo", "pack", "train", "convert", "verify", "config", "benchmark",
)  # fmt: skip


def make_app() -> typer.Typer:
    """Returns an empty command line. Unexpected errors are plain Python tracebacks; help is plain text."""
    return typer.Typer(
        pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True, rich_markup_mode=None
    )


def make_cli(command: str | None = None) -> typer.Typer:
    """Returns the command line with one command, or by default with the descriptions of all commands."""
    app = make_app()
    app.callback()(_main)
    if command == "benchmark":
        group = importlib.import_module("jobs.benchmarks.cli").app
        group.callback()(_benchmark)
        app.add_typer(group, name=command)
    elif command in COMMANDS:
        from jobs.console import add_command

        add_command(app, getattr(importlib.import_module(f"jobs.{command}"), command))
    else:
        for name in COMMANDS:  # only for the help: a command that runs is alone in its command line
            app.command(name, help=_description(name))(_main)
    return app


def _description(command: str) -> str | None:
    """Returns the docstring of a command, without importing its module."""
    if command == "benchmark":
        return _benchmark.__doc__
    module = ast.parse(Path(__file__).with_name(f"{command}.py").read_text())
    functions = {each.name: each for each in module.body if isinstance(each, ast.FunctionDef)}
    return ast.get_docstring(functions[command])


def main() -> None:
    """Runs `cvt-label`."""
    words = [word for word in sys.argv[1:] if word != "--"]
    make_cli(words[0] if words else None)()


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"cvt-label {__version__}")
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
