"""Labels a dataset: `python -m jobs.label --config FILE`, or `cvt-label label`."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import timedelta
from typing import Annotated, NamedTuple

import typer
from rich.console import RenderableType
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from jobs import console
from jobs.console import ExitStatus, print_notice
from pipeline import RunResult, commit
from pipeline import label as label_dataset
from pipeline.config import IN_PROCESS, LABEL_NEW, Config, Selection
from pipeline.run import Phase, Plan, PreparedRun
from pipeline.statistics import class_table, describe_bottleneck
from pipeline.text import pluralize

logger = logging.getLogger("cvt_label")

#: Seconds between two progress messages in the log.
LOG_INTERVAL = 10.0

#: Maximum number of examples in a line of the summary.
_EXAMPLES = 5

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
    run labels the same partition; 7 if a limit of the gate on drift is exceeded (shards may be unreadable
    too); 8 if too many images or shards failed, or the gate stopped the run; 130 if stopped by Ctrl-C or
    SIGTERM; 1 otherwise.
    """
    overrides = [*(set or ()), *[f"ray.address={IN_PROCESS}"] * no_ray]
    result = run(*console.load_job(config, overrides, retry_errors, relabel, prune), wait)
    if result.broken_failure_limits or result.aborted:
        sys.exit(ExitStatus.FAILURES)
    if result.broken_limits:
        sys.exit(ExitStatus.DRIFTED)
    sys.exit(ExitStatus.OK if result.is_complete else ExitStatus.INCOMPLETE)


def run(config: Config, selection: Selection = LABEL_NEW, wait: bool = False) -> RunResult:
    """Labels a dataset, shows the progress, and prints the result."""
    console.log_to_stderr()
    with closing(ProgressBar() if console.stderr.is_terminal else ProgressLog()) as progress:

        def show_plan(prepared: PreparedRun) -> None:
            print_notice(console.describe_plan(prepared.plan))
            progress.show_plan(prepared.plan)

        result = label_dataset(
            config,
            selection,
            on_progress=progress.show_progress,
            on_plan=show_plan,
            on_phase=progress.show_phase,
            wait=wait,
            on_wait=logger.info,
        )
    print_result(result)
    return result


class ProgressBar:
    """Shows the phase or the progress of a run in a terminal."""

    def __init__(self) -> None:
        self._estimator = Estimator()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[shards]}elapsed"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[remaining]}"),
        )
        self._bar = _TwoLineProgress(*columns, console=console.stderr, transient=True)
        self._task = self._bar.add_task("starting", total=None, shards="", remaining="")

    def close(self) -> None:
        """Removes the bar."""
        self._bar.stop()

    def show_plan(self, plan: Plan) -> None:
        """Does nothing: the total appears with the first result."""

    def show_phase(self, phase: Phase) -> None:
        """Shows the name of a phase."""
        self._bar.start()
        self._bar.update(self._task, description=str(phase), remaining="")

    def show_progress(self, progress: commit.Progress, prepared: PreparedRun) -> None:
        """Shows counts, rate and remaining time."""
        total = len(prepared.plan.shards)
        estimate = self._estimator.estimate(progress)
        self._bar.details = describe_progress(progress, prepared.plan, estimate)
        self._bar.update(
            self._task,
            description="labeling",
            total=1.0,
            completed=progress.fraction,
            shards=f"{progress.shards:,} of {pluralize(total, 'shard')}, ",
            remaining=f"remaining {estimate.remaining}" if estimate else "",
        )


class _TwoLineProgress(RichProgress):
    """A progress bar with a second line of text."""

    details = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.details:
            yield Text(self.details, no_wrap=True, overflow="ellipsis")


class ProgressLog:
    """Logs phases, and progress at regular intervals until the last result."""

    def __init__(self, interval: float = LOG_INTERVAL) -> None:
        self._interval = interval
        self._estimator = Estimator()
        self._finished = threading.Event()
        self._message = ""
        self._phase = Phase.PLANNING
        self._phase_started = time.monotonic()
        self._thread = threading.Thread(target=self._log, name="progress", daemon=True)

    def close(self) -> None:
        """Stops logging."""
        self._finished.set()
        if self._thread.is_alive():
            self._thread.join()

    def show_plan(self, plan: Plan) -> None:
        """Starts logging if there are shards to label."""
        if plan.shards:
            self._thread.start()

    def show_phase(self, phase: Phase) -> None:
        """Logs the name of a phase."""
        self._phase, self._phase_started = phase, time.monotonic()
        logger.info("%s", phase)

    def show_progress(self, progress: commit.Progress, prepared: PreparedRun) -> None:
        """Stores the latest progress for the next message."""
        total, estimate = len(prepared.plan.shards), self._estimator.estimate(progress)
        remaining = f", remaining {estimate.remaining}" if estimate else ""
        details = describe_progress(progress, prepared.plan, estimate)
        self._message = f"{progress.shards:,} of {pluralize(total, 'shard')}, {details}{remaining}"
        if progress.shards == total and not self._finished.is_set():
            self._finished.set()
            logger.info("%s", self._message)

    def _log(self) -> None:
        while not self._finished.wait(self._interval):
            seconds = time.monotonic() - self._phase_started
            logger.info("%s", self._message or f"{self._phase}, {seconds:.0f} s")


class Estimate(NamedTuple):
    """Rate in images per second, and remaining time."""

    images_per_s: float
    remaining: timedelta


class Estimator:
    """Estimates the rate and the remaining time of a run from its progress since the first result."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[float, commit.Progress] | None = None

    def estimate(self, progress: commit.Progress) -> Estimate | None:
        """Returns an estimate, or None before `MIN_RATE_SECONDS` of results."""
        now = self._clock()
        if self._first is None:
            if progress.images:
                self._first = now, progress
            return None
        since, first = self._first
        seconds, images = now - since, progress.images - first.images
        fraction = progress.fraction - first.fraction
        if seconds < MIN_RATE_SECONDS or images <= 0 or fraction <= 0:
            return None
        remaining = timedelta(seconds=round((1 - progress.fraction) / fraction * seconds))
        return Estimate(images / seconds, remaining)


def describe_progress(progress: commit.Progress, plan: Plan, estimate: Estimate | None) -> str:
    """Describes the number of images, the number of errors and the rate."""
    images = pluralize(progress.images, "image")
    if plan.images is not None:
        images = f"{progress.images:,} of {pluralize(plan.images, 'image')}"
    rate = f", {estimate.images_per_s:,.1f} images/s" if estimate else ""
    return f"{images}, {pluralize(progress.errors, 'error')}{rate}"


def print_result(result: RunResult) -> None:
    """Prints the classes and a summary of the run."""
    totals, stats, plan = result.totals, result.statistics, result.plan
    topk = result.job.topk
    if stats is not None and stats.count.any():
        classes = class_table(stats, result.partition.labels, topk)
        console.print_table(console.make_class_table(classes, top=20))
    fields = {"plan": console.describe_plan(plan)}
    if plan.ignored.total():
        fields["ignored"] = plan.describe_ignored()
    if plan.shards:
        labeled = totals.shards - len(totals.unreadable)
        fields["images"] = f"{totals.images:,} in {pluralize(labeled, 'shard')}"
        fields["errors"] = f"{totals.errors:,}" + (" (listed in the report)" if totals.errors else "")
        rate = result.images_per_s
        too_short = "unknown: the run was too short"
        fields["images/s"] = too_short if rate is None else f"{rate:,.1f} from the first result to the last"
        fields["total time"] = f"{result.total_seconds:,.1f} s"
    fields["output"] = result.partition.uri
    fields["report"] = f"{result.partition.uri}/report.html"
    if result.stages:
        fields["decoded by"], fields["bound by"] = result.decoder, describe_bottleneck(result.stages)
    if result.pruned:
        fields["pruned"] = f"{pluralize(result.pruned, 'shard')} deleted from the input"
    if stats is not None and stats.has_targets:
        fields["accuracy"] = f"{console.format_accuracy(stats, topk)}, of all labels"
    console.print_fields(fields)
    if totals.unmatched.count:
        targets = pluralize(totals.unmatched.count, "target")
        examples = "; ".join(totals.unmatched.examples(_EXAMPLES))
        print_notice(f"unmatched: {targets} ({examples}); set input.labels: false to ignore labels")
    if totals.duplicate_keys:
        print_notice(f"duplicate keys within a shard: {pluralize(totals.duplicate_keys, 'sample')}")
    for row in totals.unreadable:
        print_notice(f"not labeled: {row.error}")
    if plan.skipped_failures:
        shards = pluralize(plan.skipped_failures, "shard")
        print_notice(f"not labeled: {shards} that could not be read before (to retry: --retry-errors)")
    for message in result.broken_limits:
        print_notice(f"drift from the previous run: {message}")
    for message in result.broken_failure_limits:
        print_notice(f"too many failures: {message}")
    if result.aborted:
        shards = pluralize(len(plan.shards) - totals.shards, "shard")
        print_notice(f"the gate stopped the run: {shards} not labeled; run the command again to label them")


if __name__ == "__main__":
    console.run_command(label)
