"""What the commands share: exit statuses, errors as messages, options, and output to the terminal."""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from cvt.errors import CheckpointError
from pipeline import find_partition, load_job_config, open_partition
from pipeline.commit import LeaseHeldError, LeaseLostError, Partition
from pipeline.config import Config, ConfigError, Selection, load_recorded
from pipeline.publish import TableBusyError
from pipeline.read import NoShardsError
from pipeline.run import Plan, ShardState, Stopped
from pipeline.schedule import SubmissionRefusedError, UnknownJobError
from pipeline.statistics import ClassStatistics, format_class_row, predicted_classes
from pipeline.storage import StorageError
from pipeline.text import escape_unprintable


class ExitStatus(IntEnum):
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
PartitionArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="URI", help="URI of a model's labels: .../model=NAME-FINGERPRINT.", show_default=False
    ),
]
PartitionConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Instead of the URI, a job's configuration; its model is not loaded."
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
    str, typer.Argument(metavar="JOB", help="The job's id, as submit and status print it.")
]

# Without these options, a run's record keeps what that run had; else they are off.
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

#: Width of tables in files and pipes.
_WIDTH = 120
stdout = Console(width=None if sys.stdout.isatty() else _WIDTH, markup=False, emoji=False, highlight=False)
#: For what a terminal shows while a command runs.
stderr = Console(stderr=True)


def make_app() -> typer.Typer:
    """A command line whose unexpected errors are plain Python tracebacks, and whose help is plain text."""
    return typer.Typer(
        pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True, rich_markup_mode=None
    )


def run_command(command: Callable[..., None]) -> None:
    """Runs one command as a module of its own: `python -m jobs.<command>`."""
    app = make_app()
    app.command()(command)
    app()


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Ends the process with a message and a status where a command can't go on; decorates commands."""
    try:
        yield
    except ConfigError as error:
        _leave(ExitStatus.USAGE, *str(error).split("\n"))  # a line for each fault
    except (StorageError, CheckpointError, NoShardsError, ConnectionError, UnknownJobError) as error:
        _leave(ExitStatus.UNUSABLE, str(error))
    except SubmissionRefusedError as error:
        _leave(ExitStatus.REFUSED, str(error))
    except (LeaseHeldError, LeaseLostError, TableBusyError) as error:
        _leave(ExitStatus.BUSY, str(error))
    except Stopped:
        _leave(
            ExitStatus.INTERRUPTED, "stopped; what is labelled is in the manifest, and a rerun does the rest"
        )
    except KeyboardInterrupt:
        _leave(ExitStatus.INTERRUPTED, "interrupted")


def _leave(status: ExitStatus, message: str, *more_lines: str) -> None:
    for line in (f"cvt-label: {message}", *more_lines):
        print_notice(line)
    sys.exit(status)


def print_line(line: str) -> None:
    """Prints a line, in which names from data are made printable, to standard output."""
    typer.echo(escape_unprintable(line))


def print_notice(line: str) -> None:
    """Prints a line, in which names from data are made printable, to standard error."""
    typer.echo(escape_unprintable(line), err=True)


def print_fields(facts: Mapping[str, str]) -> None:
    """Prints names and values in two columns."""
    width = max(map(len, facts))
    for name, value in facts.items():
        print_line(f"{name:<{width}}  {value}")


def print_log(text: str) -> None:
    """Prints part of a job's log as it is, but for what a terminal would act on."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    typer.echo(escape_unprintable(lines, keep="\n\t"), nl=False)


def make_table(title: str, texts: Iterable[str], numbers: Iterable[str]) -> Table:
    """Returns an empty table with columns of text and, to the right of them, columns of numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def log_to_stderr() -> None:
    """Writes the program's log to standard error, each message on one line; in a terminal, above the bar."""
    handler: logging.Handler = logging.StreamHandler()
    form = "%(asctime)s %(levelname)s %(message)s"
    if stderr.is_terminal:
        handler = RichHandler(console=stderr, show_path=False, log_time_format="[%X]")
        form = "%(message)s"
    handler.setFormatter(OneLineFormatter(form))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("cvt_label").setLevel(logging.INFO)


class OneLineFormatter(logging.Formatter):
    """Writes each message on one line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: D102, N802 - logging's own
        record.message = escape_unprintable(record.message)
        return super().formatMessage(record)


def load_job(
    path: Path,
    overrides: list[str] | None,
    retry_errors: bool | None,
    relabel: bool | None,
    prune: bool | None,
    *,
    keep_relative_paths: bool = False,
) -> tuple[Config, Selection]:
    """Returns a job's configuration, and what it selects.

    From a run's record, a selection that no option sets (None) is that run's, and is printed.

    Raises:
        ConfigError: as `pipeline.config.load_config`.
    """
    config, record = load_recorded(Config, path, overrides or (), keep_relative_paths=keep_relative_paths)
    given = {"retry_errors": retry_errors, "relabel": relabel, "prune": prune}
    selected = record.get("selection", {})
    again = [name for name, value in given.items() if value is None and selected.get(name) is True]
    if again:
        options = " ".join(f"--{name.replace('_', '-')}" for name in again)
        print_notice(
            f"as run {record['run']} had it: {options} ({options.replace('--', '--no-')} leaves it out)"
        )
    return config, Selection(**{name: bool(value) or name in again for name, value in given.items()})


def resolve_partition(uri: str | None, config: Path | None, overrides: list[str] | None = None) -> Partition:
    """Returns the partition that a command line names, by its URI or by the configuration of its job.

    Raises:
        ConfigError: as `pipeline.config.load_config`.
        StorageError: there is no such partition.
    """
    if (uri is None) == (config is None):
        raise typer.BadParameter("give either a URI or --config")
    if config is not None:
        return find_partition(load_job_config(config, overrides or ()))
    if overrides:
        raise typer.BadParameter("--set needs --config")
    return open_partition(str(uri))


def make_class_table(classes: pa.Table, most: int) -> Table:
    """The most frequently predicted classes, as a table for the terminal."""
    rows = predicted_classes(classes)
    title = f"Classes of all {sum(row['count'] for row in rows):,} labelled images"
    if most < len(rows):
        title += f" (the {most} most frequent of {len(rows)})"
    headings = ["images", "share", "score", "p05", "p50", "p95"]
    if any(row["support"] is not None for row in rows):
        headings += ["precision", "recall", "F1"]
    table = make_table(title, ["label"], headings)
    for row in rows[:most]:
        table.add_row(escape_unprintable(row["label"]), *format_class_row(row))
    return table


def describe_plan(plan: Plan) -> str:
    """How many shards are in which state, and how many are to be labelled."""
    counts = [f"{plan.states[state]:,} {state}" for state in ShardState if plan.states[state]]
    again = f" ({plan.reprocessed:,} of them again)" if plan.reprocessed else ""
    prune = f", {len(plan.to_prune):,} to prune" if plan.selection.prune else ""
    return f"{', '.join(counts)}; {len(plan.shards):,} to label{again}{prune}"


def format_accuracy(stats: ClassStatistics, topk: int) -> str:
    """Top-1 accuracy over all rows with targets, and top-5 where rows of `topk` classes tell it."""
    top5 = stats.top5_accuracy(topk)
    return f"{stats.top1_accuracy():.2%} top-1" + (f", {top5:.2%} top-5" if top5 is not None else "")
