"""Submits labeling jobs on a schedule: `cvt-label schedule`."""

import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated

import typer

from jobs import console
from jobs.console import ExitStatus
from pipeline.config import DatasetConfig, ScheduleConfig, load_config
from pipeline.dataflow import interrupts_deferred
from pipeline.schedule import Scheduler, StateFile, next_scheduled_times

#: Number of scheduled times that `--status` prints.
_NEXT_TIMES = 3


def schedule(
    config: console.YamlOption,
    set: console.SetOption = None,
    once: Annotated[bool, typer.Option("--once", help="Submit jobs that are due, and exit.")] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Print the next times and the last job of each dataset.")
    ] = False,
) -> None:
    """Submit labeling jobs on the schedules of a list of datasets.

    Runs until it is stopped. Each dataset has a cron expression.
    Each scheduled time is submitted once, also after crashes and with several schedulers. A scheduled time is
    skipped while the dataset's last job runs. After downtime, one job covers all missed scheduled times.

    More exit statuses: 0 after SIGTERM or Ctrl-C (submitted jobs continue); 4 if, with --once or --status, a
    dataset's state or the cluster cannot be accessed.
    """
    loaded = load_config(ScheduleConfig, config, set or (), keep_relative_paths=True)
    if not status:
        sys.exit(_run(loaded, once))
    result, width = ExitStatus.OK, max(map(len, loaded.datasets))
    for name, dataset in loaded.datasets.items():
        try:
            for line in _state(name, dataset):
                console.print_line(f"{name:<{width}}  {line}")
        except Exception as error:  # does not affect the other datasets
            console.print_line(f"{name:<{width}}  cannot be read: {error}")
            result = ExitStatus.UNAVAILABLE
    sys.exit(result)


def _run(config: ScheduleConfig, once: bool) -> ExitStatus:
    console.log_to_stderr()
    scheduler = Scheduler(config)
    try:
        while True:
            with interrupts_deferred():
                problems = scheduler.poll()
            if once:
                return ExitStatus.UNAVAILABLE if problems else ExitStatus.OK
            time.sleep(config.submit.poll_interval_s)
    except KeyboardInterrupt:
        return ExitStatus.OK


def _state(name: str, dataset: DatasetConfig) -> Iterator[str]:
    for scheduled in next_scheduled_times(dataset, datetime.now(UTC), _NEXT_TIMES):
        zone = "" if str(dataset.timezone) == "UTC" else f" ({scheduled:%Y-%m-%d %H:%M} {dataset.timezone})"
        yield _field("next", _format_time(scheduled) + zone)
    state = StateFile(name, dataset).read()
    if state is None:
        yield "not polled by a scheduler yet"
        return
    if state.current_job is not None:
        yield _field("submitted", state.current_job.id)
    if state.last_error is not None:
        yield _field("error", state.last_error)
    if (last := state.last_job) is not None:
        outcome = f"{last.state.lower()}, exit status {last.exit_status}; {last.message}"
        yield _field("last", f"{last.id} {outcome}")
    if (skipped := state.last_skipped) is not None:
        yield _field("skipped", f"{_format_time(skipped.scheduled_time)}; {skipped.reason}")


def _field(name: str, value: str) -> str:
    return f"{name:<{len('submitted')}}  {value}"


def _format_time(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
