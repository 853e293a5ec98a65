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
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jobs.console import (
    ConfigOption,
    Exit,
    OneLineFormatter,
    PruneOption,
    RelabelOption,
    RetryErrorsOption,
    SetOption,
    accuracy,
    class_statistics_table,
    err,
    exit_status,
    load_job,
    out,
    print_facts,
    run_alone,
    states_line,
)
from pipeline import commit
from pipeline.config import IN_PROCESS, LABEL_NEW, Config, Selection
from pipeline.run import Plan, PreparedRun, RunResult
from pipeline.run import label as label_dataset
from pipeline.statistics import bound_by, class_table
from pipeline.text import printable

logger = logging.getLogger("cvt_label")

#: Seconds between lines of progress where there is no terminal.
LOG_INTERVAL = 10.0

#: Seconds after the first results until they tell a pace.
PACE_AFTER = 5.0


def label(
    config: ConfigOption,
    set: SetOption = None,
    retry_errors: RetryErrorsOption = None,
    relabel: RelabelOption = None,
    prune: PruneOption = None,
    no_ray: Annotated[
        bool, typer.Option("--no-ray", help="Run all stages in this process: fast for small datasets.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for another run on the same labels to end.")
    ] = False,
) -> None:
    """Label every shard of the input that is new or has changed; write Parquet and per-class statistics.

    With a run's record for the configuration it labels with the same model, and selects what that run had
    selected, unless options say otherwise.

    Exit status: 0 when everything is labelled; 2 when the configuration can't be used; 3 when shards
    could not be read (the others are labelled); 4 when input, output or model can't be used; 5 when
    another run works on the same labels; 7 when a limit of the configured gate is broken (what 3 says may
    be so, too); 130 when stopped by Ctrl-C or SIGTERM; 1 otherwise.
    """
    with exit_status():
        overrides = [*(set or ()), *[f"ray.address={IN_PROCESS}"] * no_ray]
        result = run(*load_job(config, overrides, retry_errors, relabel, prune), wait)
    if result.broken_limits:
        sys.exit(Exit.DRIFTED)
    sys.exit(Exit.OK if result.is_complete else Exit.INCOMPLETE)


def run(config: Config, selection: Selection = LABEL_NEW, wait: bool = False) -> RunResult:
    """Labels with progress shown, and prints what came of it."""
    # In a terminal, lines have to go above the bar.
    handler: logging.Handler = logging.StreamHandler()
    form = "%(asctime)s %(levelname)s %(message)s"
    if err.is_terminal:
        handler = RichHandler(console=err, show_path=False, log_time_format="[%X]")
        form = "%(message)s"
    handler.setFormatter(OneLineFormatter(form))
    logging.basicConfig(handlers=[handler])
    logger.setLevel(logging.INFO)
    with closing(ProgressBar() if err.is_terminal else ProgressLines()) as shown:

        def planned(prepared: PreparedRun) -> None:
            err.print(states_line(prepared.plan), markup=False, highlight=False)
            shown.planned(prepared.plan)

        result = label_dataset(
            config, selection, on_progress=shown.update, wait=wait, on_wait=logger.info, on_plan=planned
        )
    print_result(result)
    return result


class ProgressBar:
    """Progress as a bar in a terminal, from the first results on: what Ray says before would break it."""

    def __init__(self) -> None:
        self._pace = Pace()
        state = TextColumn("shards · {task.fields[state]}")
        columns = TextColumn("labelling"), BarColumn(), MofNCompleteColumn(), state, TimeElapsedColumn()
        self._bar = Progress(*columns, console=err, transient=True)
        self._task = self._bar.add_task("", state="")

    def close(self) -> None:
        """Removes the bar."""
        self._bar.stop()

    def planned(self, plan: Plan) -> None:
        """Takes the plan, before the first result."""
        self._bar.update(self._task, total=len(plan.shards))

    def update(self, progress: commit.Progress, prepared: PreparedRun) -> None:
        """Takes the latest progress."""
        self._bar.start()
        state = self._pace.described(progress, prepared.plan)
        self._bar.update(self._task, completed=progress.shards, state=state)


class ProgressLines:
    """Progress as a line in the log every few seconds, whether results come or not, until the last has."""

    def __init__(self, interval: float = LOG_INTERVAL) -> None:
        self._interval = interval
        self._pace = Pace()
        self._over = threading.Event()
        self._state = ""
        self._teller = threading.Thread(target=self._tell, name="progress", daemon=True)

    def close(self) -> None:
        """Logs no more lines."""
        self._over.set()
        if self._teller.is_alive():
            self._teller.join()

    def planned(self, plan: Plan) -> None:
        """Takes the plan, before the first result."""
        if plan.shards:
            self._teller.start()

    def update(self, progress: commit.Progress, prepared: PreparedRun) -> None:
        """Takes the latest progress."""
        plan = prepared.plan
        described = self._pace.described(progress, plan)
        self._state = f"{progress.shards} of {len(plan.shards)} shards, {described}"
        if progress.shards == len(plan.shards) and not self._over.is_set():
            self._over.set()
            logger.info("%s", self._state)

    def _tell(self) -> None:
        started = time.monotonic()
        while not self._over.wait(self._interval):
            logger.info("%s", self._state or f"no results yet, after {time.monotonic() - started:.0f} s")


class Pace:
    """What progress means in images a second and time left, from the first results on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[float, commit.Progress] | None = None

    def described(self, progress: commit.Progress, plan: Plan) -> str:
        """Images, of how many if the listing knows, errors, and, when it can be told, pace and time left."""
        total = f" of {plan.images:,}" if plan.images is not None else ""
        text = f"{progress.images:,}{total} images, {progress.errors:,} errors"
        now = self._clock()
        if self._first is None:
            if progress.images:
                self._first = now, progress
            return text
        since, first = self._first
        images, share = progress.images - first.images, progress.share - first.share
        if now - since < PACE_AFTER or images <= 0 or share <= 0:
            return text
        left = timedelta(seconds=round((1 - progress.share) / share * (now - since)))
        return f"{text}, {images / (now - since):,.1f}/s, {left} left"


def print_result(result: RunResult) -> None:
    """Prints the classes, and what a person wants to know at the end."""
    totals, stats, work = result.totals, result.statistics, result.plan
    topk = result.job.config.output.topk
    if stats is not None and stats.count.any():
        out.print(class_statistics_table(class_table(stats, result.partition.labels, topk), most=20))
    rows = {
        "shards": states_line(work),
        "images": f"{totals.images:,} in {totals.shards - len(totals.unreadable):,} shards",
        "errors": f"{totals.errors:,}",
        "images/s": f"{result.rate:,.1f}",
        "output": result.partition.uri,
    }
    if result.stages:
        rows["decoded by"] = result.decoder
        rows["bound by"] = bound_by(result.stages)
    if not work.shards:
        rows = {name: rows[name] for name in ("shards", "output")}
    if result.pruned:
        rows["pruned"] = f"{result.pruned:,} shards that the input no longer has"
    if stats is not None and stats.has_targets:
        rows["accuracy"] = f"{accuracy(stats, topk)}, of all labels"
    print_facts(rows)
    if totals.duplicate_keys:
        message = f"{totals.duplicate_keys:,} samples share a key with an earlier one of their shard"
        err.print(message, markup=False)
    for row in totals.unreadable:
        err.print(f"not labelled: {printable(str(row.error))}", markup=False, soft_wrap=True)
    if work.skipped_failures:
        message = f"not labelled: {work.skipped_failures:,} shards that earlier runs could not read"
        err.print(f"{message} (--retry-errors tries them again)", markup=False)
    for message in result.broken_limits:
        err.print(f"drifted from the run before: {message}", markup=False, highlight=False)


if __name__ == "__main__":
    run_alone(label)
