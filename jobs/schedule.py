"""Labels datasets when they are due: `python -m jobs.schedule --config FILE`, or `cvt-label schedule`."""

import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated

import typer

from jobs import console
from jobs.console import Exit
from pipeline.config import DatasetConfig, ScheduleConfig, load_config
from pipeline.dataflow import interrupts_deferred, sigterm_interrupts
from pipeline.schedule import Scheduler, StateFile, next_ticks

_DRY_RUN_TICKS = 3


@console.exit_status()
def schedule(
    config: console.ConfigOption,
    set: console.SetOption = None,
    once: Annotated[bool, typer.Option("--once", help="Do what is due now, and end.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print each dataset's next ticks; change nothing.")
    ] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Print the state of each dataset; change nothing.")
    ] = False,
) -> None:
    """Submit a labeling job for each dataset of a list when its cron expression is due, until stopped.

    Each tick (scheduled time) is submitted once, whatever dies and however many schedulers run. It is skipped
    while the dataset's last job runs. After downtime, one job makes up for all missed ticks.

    Exit status: 0, also when stopped by SIGTERM or Ctrl-C (jobs go on); 2 when the configuration can't be
    used; 4 when, with --once or --status, a dataset's state or the cluster can't be used.
    """
    loaded = load_config(ScheduleConfig, config, set or (), keep_relative_paths=True)
    if not (dry_run or status):
        sys.exit(_run(loaded, once))
    result = Exit.OK
    for name, dataset in loaded.datasets.items():
        try:
            lines = list(_ticks(dataset) if dry_run else _state(name, dataset))
        except Exception as error:  # does not affect the other datasets
            lines, result = [f"can't be read: {error}"], Exit.UNUSABLE
        for line in lines:
            console.show(f"{name}  {line}")
    sys.exit(result)


def _run(config: ScheduleConfig, once: bool) -> Exit:
    console.log_to_stderr()
    scheduler = Scheduler(config)
    try:
        with sigterm_interrupts():
            while True:
                with interrupts_deferred():
                    problems = scheduler.poll()
                if once:
                    return Exit.UNUSABLE if problems else Exit.OK
                time.sleep(config.submit.poll_interval_s)
    except KeyboardInterrupt:
        return Exit.OK


def _ticks(dataset: DatasetConfig) -> Iterator[str]:
    for tick in next_ticks(dataset, datetime.now(UTC), _DRY_RUN_TICKS):
        zone = "" if str(dataset.timezone) == "UTC" else f" ({tick:%Y-%m-%d %H:%M} {dataset.timezone})"
        yield _shown(tick) + zone


def _state(name: str, dataset: DatasetConfig) -> Iterator[str]:
    state = StateFile(name, dataset).read()
    yield f"next: {_shown(next_ticks(dataset, datetime.now(UTC), 1)[0])}"
    if state is None:
        yield "no scheduler has polled it yet"
        return
    if (current := state.current) is not None:
        problem = f"; {current.problem}" if current.problem else ""
        yield f"{'submitted' if current.submitted else 'claimed'}: {current.id}{problem}"
    if (last := state.last) is not None:
        yield f"last: {last.id} {last.state.lower()}, exit status {last.exit_status}; {last.message}"
    if state.skipped is not None:
        yield f"skipped: {_shown(state.skipped.tick)}; {state.skipped.reason}"


def _shown(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


if __name__ == "__main__":
    console.run_alone(schedule)
