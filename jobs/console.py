"""What the jobs share with the terminal: exit statuses, errors as messages, options, tables."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pyarrow as pa
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cvt.runtimes import DTYPES, RUNTIMES, Device
from pipeline.run import State
from pipeline.statistics import class_cells, occurring
from pipeline.text import printable

if TYPE_CHECKING:
    from pipeline.commit import Partition
    from pipeline.config import Config, Selection
    from pipeline.run import Plan
    from pipeline.statistics import ClassStatistics


class Exit(IntEnum):
    """Exit statuses, for scripts."""

    OK = 0
    #: Something went wrong that no other status names.
    FAILED = 1
    #: The command line or the configuration can't be used.
    USAGE = 2
    #: The run ended, and labelled everything but shards that it couldn't read.
    INCOMPLETE = 3
    #: Input, output or model can't be reached or used.
    UNUSABLE = 4
    #: Another run works on the same labels.
    BUSY = 5
    #: The job was submitted before, or another one for the same dataset and model isn't over.
    REFUSED = 6
    #: A run, or a comparison, breaks a limit on drift that was given.
    DRIFTED = 7
    INTERRUPTED = 130


ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="YAML configuration (see configs/), or the record of a run.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field: section.field=value. May be given several times."),
]


def _each_of(names: Collection[str]) -> Callable[[list[str] | None], list[str] | None]:
    """Refuses, of an option that may be repeated, what is none of these: Typer knows no lists of literals."""

    def checked(values: list[str] | None) -> list[str] | None:
        for value in values or ():
            if value not in names:
                raise typer.BadParameter(f"{value!r} is not one of {', '.join(names)}")
        return values

    return checked


def precisions_option(default: str) -> Any:
    """The option `--precision`, which may be repeated, with words for what it is where it isn't given."""
    shown = f"May be repeated ({default})."
    return typer.Option("--precision", metavar="|".join(DTYPES), callback=_each_of(DTYPES), help=shown)


PartitionArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[URI]", help="URI of a model's labels: .../model=NAME-FINGERPRINT.", show_default=False
    ),
]
PartitionConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Instead of the URI, a job's configuration; its model is not loaded."
    ),
]
RuntimesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--runtime", metavar="|".join(RUNTIMES), callback=_each_of(RUNTIMES), help="May be repeated (torch)."
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="The cluster's dashboard, http://HEAD:8265; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this "
        "machine's.",
        show_default=False,
    ),
]
JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="The job's id, as submit and status tell it.")
]

# Not given, they are as the recorded run had them, if --config is its record, and else off.
RetryErrorsOption = Annotated[
    bool | None,
    typer.Option(
        "--retry-errors/--no-retry-errors", help="Also shards with error rows, or that could not be read."
    ),
]
RelabelOption = Annotated[
    bool | None, typer.Option("--relabel/--no-relabel", help="All shards, whatever is labelled.")
]
PruneOption = Annotated[
    bool | None,
    typer.Option("--prune/--no-prune", help="Remove the labels of shards that the input no longer has."),
]

#: Tables in files and pipes are as wide as they need; only a terminal has an edge.
_WIDTH = 120
out = Console(width=None if sys.stdout.isatty() else _WIDTH)
err = Console(stderr=True, width=None if sys.stderr.isatty() else _WIDTH)


def make_app() -> typer.Typer:
    """A command line whose unexpected errors are plain Python tracebacks, and whose help is plain text."""
    return typer.Typer(
        pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True, rich_markup_mode=None
    )


def run_alone(command: Callable[..., None]) -> None:
    """Runs one command as a module of its own: `python -m jobs.<command>`."""
    app = make_app()
    app.command()(command)
    app()


@contextmanager
def exit_status() -> Iterator[None]:
    """Ends the process with a message and a status where a command can't go on."""
    from cvt.errors import CheckpointError
    from pipeline.commit import LeaseHeldError, LeaseLostError
    from pipeline.config import ConfigError
    from pipeline.publish import TableBusyError
    from pipeline.read import NoShardsError
    from pipeline.run import Stopped
    from pipeline.schedule import SubmissionRefusedError, UnknownJobError
    from pipeline.storage import StorageError

    try:
        yield
    except ConfigError as error:
        _leave(Exit.USAGE, error)
    except (StorageError, CheckpointError, NoShardsError, ConnectionError, UnknownJobError) as error:
        _leave(Exit.UNUSABLE, error)
    except SubmissionRefusedError as error:
        _leave(Exit.REFUSED, error)
    except (LeaseHeldError, LeaseLostError, TableBusyError) as error:
        _leave(Exit.BUSY, error)
    except Stopped:
        _leave(Exit.INTERRUPTED, "stopped; what is labelled is in the manifest, and a rerun does the rest")
    except KeyboardInterrupt:
        _leave(Exit.INTERRUPTED, "interrupted")


def load_job(
    path: Path,
    overrides: list[str] | None,
    retry_errors: bool | None,
    relabel: bool | None,
    prune: bool | None,
    *,
    keep_relative_paths: bool = False,
) -> tuple[Config, Selection]:
    """A job's configuration, and what it selects.

    Of a run's record it is what that run had selected, which is said, unless an option is given (not None).

    Raises:
        ConfigError: as `pipeline.config.load_config`.
    """
    from pipeline.config import Config, Selection, load_recorded

    config, record = load_recorded(Config, path, overrides or (), keep_relative_paths=keep_relative_paths)
    given = {"retry_errors": retry_errors, "relabel": relabel, "prune": prune}
    selected = record.get("selection", {})
    again = [name for name, value in given.items() if value is None and selected.get(name) is True]
    if again:
        options = " ".join(f"--{name.replace('_', '-')}" for name in again)
        message = f"as run {record['run']} had it: {options} ({options.replace('--', '--no-')} leaves it out)"
        err.print(printable(message), markup=False, highlight=False, soft_wrap=True)
    return config, Selection(**{name: bool(value) or name in again for name, value in given.items()})


def given_partition(uri: str | None, config: Path | None, overrides: list[str] | None = None) -> Partition:
    """The partition that a command line names, by its URI or by the configuration of its job.

    Raises:
        ConfigError: as `pipeline.config.load_config`.
        StorageError: there is no such partition.
    """
    from pipeline.commit import Partition
    from pipeline.config import Config, load_config
    from pipeline.run.partitions import find_partition
    from pipeline.storage import Storage

    if (uri is None) == (config is None):
        raise typer.BadParameter("give either a URI or --config")
    if config is not None:
        return find_partition(load_config(Config, config, overrides or ()))
    if overrides:
        raise typer.BadParameter("--set needs --config")
    return Partition.open(Storage(), str(uri))


def found_device(device: Device) -> Literal["cpu", "cuda"]:
    """What `--device` auto, cpu or cuda means here, "cpu" or "cuda"; refuses a GPU that isn't there."""
    import torch  # takes seconds, which --help need not wait for

    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch finds no GPU", param_hint="--device")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def check_folder_of(output: Path | None) -> None:
    """Refuses, before anything is measured, an `--output` that couldn't be written after it."""
    if output is not None and not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {output.parent}", param_hint="--output")


def _leave(status: Exit, message: object) -> None:
    # A configuration's faults stand on a line each; all other messages may name what a bucket holds.
    lines = str(message).split("\n") if isinstance(message, ValueError) else [str(message)]
    shown = "\n".join(map(printable, lines))
    err.print(f"cvt-label: {shown}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)


def class_statistics_table(classes: pa.Table, most: int) -> Table:
    """The most frequent of the classes that occur, as a table for the terminal."""
    rows = occurring(classes)
    has_targets = any(row["support"] is not None for row in rows)
    shown = rows[:most]
    title = f"Classes of all {sum(row['count'] for row in rows):,} labelled images"
    if len(shown) < len(rows):
        title += f" (the {len(shown)} most frequent of {len(rows)})"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("label", overflow="fold")
    headings = ["images", "share", "score", "p05", "p50", "p95"]
    if has_targets:
        headings += ["precision", "recall", "F1"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in shown:
        table.add_row(plain(row["label"]), *class_cells(row))
    return table


def states_line(plan: Plan) -> str:
    """How many shards are in which state, and how many are to be labelled."""
    counts = [f"{plan.states[state]:,} {state}" for state in State if plan.states[state]]
    again = f" ({plan.again:,} of them again)" if plan.again else ""
    prune = f", {len(plan.to_prune):,} to prune" if plan.selection.prune else ""
    return f"{', '.join(counts)}; {len(plan.shards):,} to label{again}{prune}"


def accuracy(stats: ClassStatistics, topk: int) -> str:
    """Top-1 accuracy over all rows with targets, and top-5 where rows of `topk` classes tell it."""
    top5 = stats.top5_accuracy(topk)
    return f"{stats.top1_accuracy():.2%} top-1" + (f", {top5:.2%} top-5" if top5 is not None else "")


def print_log(text: str) -> None:
    """Prints part of a job's log as it is, but for what a terminal would act on."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    sys.stdout.write(printable(lines, keep="\n\t"))
    sys.stdout.flush()


def plain(text: str) -> str:
    """Text from data, with nothing in it that a terminal or rich would act on."""
    from rich.markup import escape

    return escape(printable(text))


def print_facts(facts: Mapping[str, str]) -> None:
    """Prints names and values in two columns."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(name, value)
    out.print(table, soft_wrap=True, markup=False)


class OneLineFormatter(logging.Formatter):
    """Writes each message on one line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: D102, N802 - logging's own
        record.message = printable(record.message)
        return super().formatMessage(record)
