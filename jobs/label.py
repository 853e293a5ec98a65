"""Labels a dataset: `python -m jobs.label --config FILE`, or `cvt-label label`."""

import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jobs import console
from jobs.console import ExitStatus, print_notice
from pipeline import RunResult, commit
from pipeline import label as label_dataset
from pipeline.config import IN_PROCESS, LABEL_NEW, Config, Selection
from pipeline.run import Plan, PreparedRun
from pipeline.statistics import class_table, describe_bottleneck

logger = logging.getLogger("cvt_label")

#: Seconds between two progress messages in the log.
LOG_INTERVAL = 10.0

#: Seconds of results that an estimate of the rate needs.
MIN_RATE_SECONDS = 5.0


@console.exit_on_error()
def label(
    config: console.ConfigOption,
    set: console.SetOption = None,
    retry_errors: console.RetryErrorsOption = None,
    relabel: console.RelabelOption = None,
    prune: console.PruneOption = None,
    no_ray: Annotated[
        bool, typer.Option("--no-ray", help="Run all stages in this process: faster for small datasets.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until no other run labels the same partition.")
    ] = False,
) -> None:
    """Label the new and changed shards of a dataset.

    Writes Parquet labels, class statistics and a report. With a run record in place of a configuration, the
    command uses the model and the selection of that run; options override the selection.

    Exit status: 0 if all shards are labeled; 2 if the configuration is not valid; 3 if shards could not be
    read (all others are labeled); 4 if the input, the output or the model cannot be accessed; 5 if another
    run labels the same partition; 7 if a limit of the configured gate is exceeded (shards may be unreadable
    too); 130 if stopped by Ctrl-C or SIGTERM; 1 otherwise.
    """
    overrides = [*(set or ()), *[f"ray.address={IN_PROCESS}"] * no_ray]
    result = run(*console.load_job(config, overrides, retry_errors, relabel, prune), wait)
    if result.broken_limits:
        sys.exit(ExitStatus.DRIFTED)
    sys.exit(ExitStatus.OK if result.is_complete else ExitStatus.INCOMPLETE)


def run(config: Config, selection: Selection = LABEL_NEW, wait: bool = False) -> RunResult:
    """Labels a dataset, shows the progress, and prints the result."""
    console.log_to_stderr()
    with closing(ProgressBar() if console.stderr.is_terminal else ProgressLog()) as progress:

        def planned(prepared: PreparedRun) -> None:
            print_notice(console.describe_plan(prepared.plan))
            progress.start(prepared.plan)

        result = label_dataset(
            config, selection, on_progress=progress.update, wait=wait, on_wait=logger.info, on_plan=planned
        )
    print_result(result)
    return result


class ProgressBar:
    """Shows a bar in a terminal, from the first results on: what Ray prints before would break it."""

    def __init__(self) -> None:
        self._pace = Pace()
        state = TextColumn("shards · {task.fields[state]}")
        columns = TextColumn("labeling"), BarColumn(), MofNCompleteColumn(), state, TimeElapsedColumn()
        self._bar = Progress(*columns, console=console.stderr, transient=True)
        self._task = self._bar.add_task("", state="")

    def close(self) -> None:
        """Removes the bar."""
        self._bar.stop()

    def start(self, plan: Plan) -> None:
        """Takes the plan, before the first result."""
        self._bar.update(self._task, total=len(plan.shards))

    def update(self, progress: commit.Progress, prepared: PreparedRun) -> None:
        """Takes the latest progress."""
        self._bar.start()
        state = self._pace.described(progress, prepared.plan)
        self._bar.update(self._task, completed=progress.shards, state=state)


class ProgressLog:
    """Logs progress every few seconds, whether results come or not, until the last result."""

    def __init__(self, interval: float = LOG_INTERVAL) -> None:
        self._interval = interval
        self._pace = Pace()
        self._finished = threading.Event()
        self._state = ""
        self._thread = threading.Thread(target=self._log, name="progress", daemon=True)

    def close(self) -> None:
        """Stops logging."""
        self._finished.set()
        if self._thread.is_alive():
            self._thread.join()

    def start(self, plan: Plan) -> None:
        """Starts logging if there are shards to label."""
        if plan.shards:
            self._thread.start()

    def update(self, progress: commit.Progress, prepared: PreparedRun) -> None:
        """Takes the latest progress."""
        shards, described = len(prepared.plan.shards), self._pace.described(progress, prepared.plan)
        self._state = f"{progress.shards} of {shards} shards, {described}"
        if progress.shards == shards and not self._finished.is_set():
            self._finished.set()
            logger.info("%s", self._state)

    def _log(self) -> None:
        started = time.monotonic()
        while not self._finished.wait(self._interval):
            logger.info("%s", self._state or f"no results yet, after {time.monotonic() - started:.0f} s")


class Pace:
    """What progress means in images a second and time left, from the first results on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[float, commit.Progress] | None = None

    def described(self, progress: commit.Progress, plan: Plan) -> str:
        """Images, their total if the listing knows it, errors, and, once known, pace and time left."""
        total = f" of {plan.images:,}" if plan.images is not None else ""
        text = f"{progress.images:,}{total} images, {progress.errors:,} errors"
        now = self._clock()
        if self._first is None:
            if progress.images:
                self._first = now, progress
            return text
        since, first = self._first
        images, fraction = progress.images - first.images, progress.fraction - first.fraction
        if now - since < MIN_RATE_SECONDS or images <= 0 or fraction <= 0:
            return text
        left = timedelta(seconds=round((1 - progress.fraction) / fraction * (now - since)))
        return f"{text}, {images / (now - since):,.1f}/s, {left} left"


def print_result(result: RunResult) -> None:
    """Prints the classes and a summary of the run."""
    totals, stats, plan = result.totals, result.statistics, result.plan
    topk = result.job.config.output.topk
    if stats is not None and stats.count.any():
        classes = class_table(stats, result.partition.labels, topk)
        console.stdout.print(console.make_class_table(classes, top=20))
    facts = {"shards": console.describe_plan(plan)}
    if plan.shards:
        facts["images"] = f"{totals.images:,} in {totals.shards - len(totals.unreadable):,} shards"
        facts["errors"] = f"{totals.errors:,}"
        if result.images_per_s is not None:
            facts["images/s"] = f"{result.images_per_s:,.1f} from the first result to the last"
        facts["total time"] = f"{result.total_seconds:,.1f} s"
    facts["output"] = result.partition.uri
    if result.stages:
        facts["decoded by"], facts["bound by"] = result.decoder, describe_bottleneck(result.stages)
    if result.pruned:
        facts["pruned"] = f"{result.pruned:,} shards that the input no longer has"
    if stats is not None and stats.has_targets:
        facts["accuracy"] = f"{console.format_accuracy(stats, topk)}, of all labels"
    console.print_fields(facts)
    if totals.duplicate_keys:
        print_notice(f"{totals.duplicate_keys:,} samples share a key with an earlier one of their shard")
    for row in totals.unreadable:
        print_notice(f"not labelled: {row.error}")
    if plan.skipped_failures:
        failures = f"{plan.skipped_failures:,} shards that earlier runs could not read"
        print_notice(f"not labelled: {failures} (--retry-errors tries them again)")
    for message in result.broken_limits:
        print_notice(f"drifted from the run before: {message}")


if __name__ == "__main__":
    console.run_command(label)
