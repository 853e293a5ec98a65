"""Labels datasets when they are due: `python -m jobs.schedule --config FILE`, or `cvt-label schedule`."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import FrameType
from typing import Annotated

import typer

from jobs.console import ConfigOption, Exit, OneLineFormatter, SetOption, exit_status, out, plain, run_alone
from pipeline.config import DatasetConfig, DatasetsConfig, load_config, make_storage
from pipeline.schedule import DatasetState, Scheduler, next_ticks, read_state, state_uri

_DRY_RUN_TICKS = 3


def schedule(
    config: ConfigOption,
    set: SetOption = None,
    once: Annotated[bool, typer.Option("--once", help="Do what is due now, and end.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print each dataset's next ticks; touch nothing.")
    ] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Print what is known of each dataset; touch nothing.")
    ] = False,
) -> None:
    """Submit a labelling job for each dataset of a list when its cron expression says so, until stopped.

    Each tick is submitted once, whatever dies and however many schedulers run; it is skipped while the
    dataset's last job runs; after downtime, only the last tick that was missed is made up for.

    Exit status: 0, also when stopped by SIGTERM or Ctrl-C (jobs go on); 2 when the configuration can't be
    used; 4 when, with --once or --status, a dataset's state or the cluster can't be used.
    """
    with exit_status():
        loaded = load_config(DatasetsConfig, config, set or ())
    if dry_run:
        _print_ticks(loaded)
    elif status:
        sys.exit(_print_states(loaded))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(message)s"))
        logging.basicConfig(handlers=[handler])
        logging.getLogger("cvt_label").setLevel(logging.INFO)
        with exit_status():
            sys.exit(_run(loaded, once))


def _run(config: DatasetsConfig, once: bool) -> Exit:
    scheduler = Scheduler(config)
    with _asked_to_stop() as stop:
        while True:
            problems = scheduler.look()
            if once:
                return Exit.UNUSABLE if problems else Exit.OK
            if stop.wait(config.submit.poll_s):
                return Exit.OK


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets, so that a look is brought to its end; a second one interrupts."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_ticks(config: DatasetsConfig) -> None:
    for name, dataset in config.datasets.items():
        for tick in next_ticks(dataset, datetime.now(UTC), _DRY_RUN_TICKS):
            zone = "" if dataset.timezone == "UTC" else f" ({tick:%Y-%m-%d %H:%M} {dataset.timezone})"
            _line(f"{name}  {tick.astimezone(UTC):%Y-%m-%d %H:%M} UTC{zone}")


def _print_states(config: DatasetsConfig) -> Exit:
    result = Exit.OK
    for name, dataset in config.datasets.items():
        try:
            state, _ = read_state(make_storage(dataset.storage), state_uri(name, dataset))
        except Exception as error:  # of this dataset alone
            result = Exit.UNUSABLE
            _line(f"{name}  can't be read: {error}")
            continue
        for line in _described(state, dataset):
            _line(f"{name}  {line}")
    return result


def _described(state: DatasetState | None, dataset: DatasetConfig) -> Iterator[str]:
    tick = next_ticks(dataset, datetime.now(UTC), 1)[0]
    yield f"next: {tick.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    if state is None:
        yield "no scheduler has seen it yet"
        return
    if state.phase != "over":
        yield f"{state.phase}: {state.job}" + (f"; {state.problem}" if state.problem else "")
    if state.last is not None:
        last = state.last
        yield f"last: {last.job} {last.state.lower()}, exit status {last.exit_status}; {last.message}"
    if state.skipped is not None:
        skipped = state.skipped.tick.astimezone(UTC)
        yield f"skipped: {skipped:%Y-%m-%d %H:%M} UTC; {state.skipped.reason}"


def _line(text: str) -> None:
    out.print(plain(text), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_alone(schedule)
