"""Shared parts of the commands: exit statuses, error messages, options and terminal output."""

import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Annotated

import pyarrow.compute as pc
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cvt.errors import CheckpointError
from pipeline import find_partition, load_job_config, open_partition
from pipeline.commit import LeaseHeldError, LeaseLostError, Partition
from pipeline.config import ConfigError, check_environment
from pipeline.dataflow import sigterm_interrupts
from pipeline.publish import TableBusyError
from pipeline.read import NoShardsError
from pipeline.run import Stopped
from pipeline.schedule import SubmissionRefusedError, UnknownJobError
from pipeline.statistics import ClassStatistics, class_table, predicted_classes
from pipeline.storage import StorageError
from pipeline.text import escape_unprintable, format_percent, format_score, pluralize, remove_secrets


class ExitStatus(IntEnum):
    """Exit statuses of all commands."""

    OK = 0
    #: Any failure without a status of its own.
    FAILED = 1
    #: The command line or the configuration is not valid.
    USAGE = 2
    #: Some shards could not be read; all others are labeled.
    INCOMPLETE = 3
    #: The input, the output, the model or the cluster cannot be accessed.
    UNAVAILABLE = 4
    #: Another run holds the lease on the partition.
    BUSY = 5
    #: The job was submitted before, or another job for the same dataset and model is running.
    REFUSED = 6
    #: A run or a comparison exceeds a drift limit.
    DRIFTED = 7
    #: Too many images have an error, too many shards cannot be read, or the gate stopped the run.
    FAILURES = 8
    INTERRUPTED = 130


ConfigOption = Annotated[
    Path,
    typer.Option("--config", "-c", metavar="FILE", help="YAML file (see configs/), or a run record."),
]
YamlOption = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="YAML file (see configs/).")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field, as in output.topk=3. Repeatable."),
]
PartitionArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="URI", help="URI of a partition: OUTPUT/model=NAME-FINGERPRINT. Default: that of --config."
    ),
]
JobConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="Configuration of a labeling job.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Dashboard of the Ray cluster, such as http://HEAD:8265. Default: RAY_API_SERVER_ADDRESS, "
        "then RAY_ADDRESS, then the cluster of this machine.",
    ),
]
JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="Id of the job, as printed by submit and status.")
]

RetryErrorsOption = Annotated[
    bool, typer.Option("--retry-errors", help="Label shards again that have errors or could not be read.")
]
RelabelOption = Annotated[bool, typer.Option("--relabel", help="Label every shard again.")]
PruneOption = Annotated[
    bool, typer.Option("--prune", help="Delete the labels of shards that were deleted from the input.")
]
ImagesOption = Annotated[str, typer.Option(metavar="URI", help="Folder or URI of shards.")]
ModelOption = Annotated[
    str,
    typer.Option(
        metavar="MODEL", help="cvt-13, cvt-21 or cvt-w24 with random weights, or any value of model.path."
    ),
]
SizeOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=32, help="Image size in pixels for random weights. Default: 224."),
]
BatchSizeOption = Annotated[int, typer.Option(metavar="N", min=1, help="Number of images in a batch.")]

#: The end of the help of each command.
EXIT_STATUSES = (
    "Exit statuses of all commands: 0 on success; 2 if the command line or the configuration is not valid; "
    "4 if the input, the output, the model or the cluster cannot be accessed; 130 if interrupted by Ctrl-C "
    "or SIGTERM; 1 after any other error."
)

#: Width of tables that are written to a file or a pipe, in characters.
_PIPE_WIDTH = 120
stdout = Console(
    width=None if sys.stdout.isatty() else _PIPE_WIDTH, markup=False, emoji=False, highlight=False
)
#: Shows progress and log messages while a command runs.
stderr = Console(stderr=True)


def add_command(app: typer.Typer, command: Callable[..., None]) -> None:
    """Adds a command to a command line. Its errors end with a message and an exit status."""
    app.command(epilog=EXIT_STATUSES)(exit_on_error()(command))


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Ends the process with a message and a status on errors, SIGTERM and Ctrl-C."""
    logging.setLogRecordFactory(RecordWithoutSecrets)
    try:
        with sigterm_interrupts():
            check_environment()
            yield
    except ConfigError as error:
        _exit(ExitStatus.USAGE, *str(error).split("\n"))  # one line per invalid field
    except (StorageError, CheckpointError, NoShardsError, ConnectionError, UnknownJobError) as error:
        _exit(ExitStatus.UNAVAILABLE, str(error))
    except SubmissionRefusedError as error:
        _exit(ExitStatus.REFUSED, str(error))
    except (LeaseHeldError, LeaseLostError, TableBusyError) as error:
        _exit(ExitStatus.BUSY, str(error))
    except Stopped:
        _exit(ExitStatus.INTERRUPTED, "stopped; run the same command again to label the remaining shards")
    except KeyboardInterrupt:
        _exit(ExitStatus.INTERRUPTED, "interrupted")
    except (typer.BadParameter, typer.Exit, typer.Abort):
        raise
    except Exception:
        _exit(ExitStatus.FAILED, "unexpected error", *traceback.format_exc().splitlines())


def _exit(status: ExitStatus, message: str, *more_lines: str) -> None:
    for line in (f"cvt-label: {message}", *more_lines):
        print_notice(line)
    sys.exit(status)


def print_line(line: str) -> None:
    """Prints a line to standard output, without secrets, and with unprintable characters escaped."""
    print(escape_unprintable(remove_secrets(line)), flush=True)


def print_notice(line: str) -> None:
    """Prints a line to standard error, without secrets, and with unprintable characters escaped."""
    # Not typer.echo: while the bar is shown, rich prints what is written to sys.stderr above the bar.
    print(escape_unprintable(remove_secrets(line)), file=sys.stderr, flush=True)


def print_fields(fields: Mapping[str, str]) -> None:
    """Prints names and values in two columns."""
    width = max(map(len, fields))
    for name, value in fields.items():
        print_line(f"{name:<{width}}  {value}")


def print_log(text: str) -> None:
    """Prints a part of a job's log, without secrets, and with control characters escaped."""
    lines = remove_secrets(text).replace("\r\n", "\n").replace("\r", "\n")
    typer.echo(escape_unprintable(lines, keep="\n\t"), nl=False)


def print_table(
    title: str, text_columns: Iterable[str], number_columns: Iterable[str], rows: Iterable[Iterable[str]]
) -> None:
    """Prints a table: first the columns of text, then the right-aligned columns of numbers."""
    # Narrow padding: the table of classes with all its columns fits 80 characters.
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    for heading in text_columns:
        table.add_column(heading, overflow="fold")
    for heading in number_columns:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*map(escape_unprintable, row))
    stdout.print(table, end="\n\n")


def log_to_stderr() -> None:
    """Sends the log to standard error, one line per message. If a bar is shown, above the bar."""
    handler = logging.StreamHandler()  # to sys.stderr, which rich replaces while the bar is shown
    handler.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("cvt_label").setLevel(logging.INFO)


class RecordWithoutSecrets(logging.LogRecord):
    """A log message, without secrets for all handlers: some libraries have their own."""

    def getMessage(self) -> str:  # noqa: D102, N802 - logging's own
        return remove_secrets(super().getMessage())


class OneLineFormatter(logging.Formatter):
    """Writes each message on one line, without secrets, and with unprintable characters escaped."""

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102 - logging's own
        return remove_secrets(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: D102, N802 - logging's own
        record.message = escape_unprintable(record.message)
        return super().formatMessage(record)


def resolve_partition(uri: str | None, config: Path | None, overrides: list[str] | None = None) -> Partition:
    """Opens the partition given by its URI or by the configuration of its job."""
    if (uri is None) == (config is None):
        raise typer.BadParameter("give a URI or --config, not both")
    if config is not None:
        return find_partition(load_job_config(config, overrides or ()))
    if overrides:
        raise typer.BadParameter("--set needs --config")
    return open_partition(str(uri))


def print_classes(stats: ClassStatistics, labels: Sequence[str], topk: int, top: int) -> None:
    """Prints a table of the `top` most frequent predicted classes, if there are any."""
    classes = predicted_classes(class_table(stats, labels, topk))
    if not classes:
        return
    images = pc.sum(classes["count"]).as_py()
    title = f"Classes of {'all ' if images > 1 else ''}{pluralize(images, 'labeled image')}"
    if top < len(classes):
        title += f" (the {f'{top} ' if top > 1 else ''}most frequent of {len(classes)})"
    headings = ["images", "%", "score", "p05", "p50", "p95"]
    if stats.has_targets:
        headings += ["precision", "recall", "F1"]
    rows = []
    for row in classes.slice(0, top).to_pylist():
        cells = [row["label"], f"{row['count']:,}", format_percent(row["fraction"])]
        cells += [format_score(row[name]) for name in ("score_mean", "score_p05", "score_p50", "score_p95")]
        if stats.has_targets:
            cells += [format_percent(row["precision"]), format_percent(row["recall"])]
            cells.append(format_score(row["f1"]))
        rows.append(cells)
    print_table(title, ["label"], headings, rows)


def format_accuracy(stats: ClassStatistics, topk: int) -> str:
    """Returns the top-1 accuracy over all rows with targets, and the top-5 accuracy if `topk` allows."""
    top5 = stats.top5_accuracy(topk)
    return f"{stats.top1_accuracy():.2%} top-1" + (f", {top5:.2%} top-5" if top5 is not None else "")
