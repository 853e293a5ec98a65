"""When each dataset of a list is due, and that each tick is submitted once.

What a scheduler knows lies beside each dataset's labels, in `schedule-<name>.json`, and changes by
conditional writes only; a tick's job has an id that derives from the tick, and the cluster takes an id once.
So a scheduler may die at any point, and any number of them may run at once:

1.  It reads the state, and writes that the tick is claimed. Killed before the write, nothing has happened,
    and the next look does it; of several at once, one writes.
2.  It submits the job of a claimed tick. Killed before, the next look finds the claim, and submits; killed
    after, the next look submits again, under the same id, and the cluster refuses: it is submitted.
3.  It writes that the tick is submitted, and later how its job ended. Killed before, the next look does it.

A cluster that starts anew forgets its jobs. Those died with it, so a claimed tick that is then submitted
again doesn't run twice at once, and what the first one labelled isn't labelled again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Literal
from zoneinfo import ZoneInfo

from croniter import croniter
from pydantic import BaseModel, ValidationError

from pipeline.config import DatasetConfig, DatasetsConfig, Selection, make_storage
from pipeline.dataflow import ClusterError
from pipeline.schedule.submission import (
    AlreadySubmittedError,
    Cluster,
    Job,
    StillRunningError,
    Submission,
    minute_tick,
)
from pipeline.storage import ABSENT, ObjectChanged, ObjectNotFound, Storage, StorageError, normalised

_logger = logging.getLogger("cvt_label")


class Outcome(BaseModel):
    """How a tick's job ended; a job that its cluster has forgotten is LOST, and has no exit status."""

    tick: datetime
    job: str
    state: str
    exit_status: int | None = None
    message: str = ""
    ended_at: datetime | None = None


class Skipped(BaseModel):
    """A tick that nothing was submitted for, and why."""

    tick: datetime
    reason: str


class DatasetState(BaseModel):
    """What is known of a dataset's ticks.

    Attributes:
        dataset: its name.
        through: ticks up to this moment are dealt with.
        phase: of the last tick that was claimed: "claimed", "submitted" or, when its job has ended, "over".
        tick, job: that tick, and the id of its job.
        problem: why that couldn't be submitted when it was tried last.
        last: how the last job that has ended did so.
        skipped: the last tick that was.
    """

    dataset: str
    through: datetime
    phase: Literal["claimed", "submitted", "over"] = "over"
    tick: datetime | None = None
    job: str | None = None
    problem: str | None = None
    last: Outcome | None = None
    skipped: Skipped | None = None

    def changed(self, **values: object) -> DatasetState:
        """The same, with other values."""
        return self.model_copy(update=values)


def next_ticks(dataset: DatasetConfig, now: datetime, count: int) -> list[datetime]:
    """The next times that a dataset is due, in its time zone."""
    times = croniter(dataset.cron, now.astimezone(ZoneInfo(dataset.timezone)))
    return [times.get_next(datetime) for _ in range(count)]


def last_tick(dataset: DatasetConfig, now: datetime) -> datetime:
    """The last time that a dataset was due, at `now` at the latest (UTC)."""
    after = now.replace(microsecond=0) + timedelta(seconds=1)
    times = croniter(dataset.cron, after.astimezone(ZoneInfo(dataset.timezone)))
    return times.get_prev(datetime).astimezone(UTC)


def state_uri(name: str, dataset: DatasetConfig) -> str:
    """Where a dataset's state lies."""
    return f"{normalised(dataset.output.uri)}/schedule-{name}.json"


def read_state(storage: Storage, uri: str) -> tuple[DatasetState | None, str]:
    """A dataset's state and its version; None where nothing has looked at it yet.

    Raises:
        StorageError: it can't be read, or is none.
    """
    while True:
        try:
            version = storage.stat(uri).version
            return DatasetState.model_validate_json(storage.read(uri, version)), version
        except ObjectNotFound:
            return None, ABSENT
        except ObjectChanged:
            continue
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise StorageError(uri, f"not a schedule's state: {field or 'it'}: {first['msg']}") from None


class Scheduler:
    """Looks at the datasets of a list, and submits what is due."""

    def __init__(
        self,
        config: DatasetsConfig,
        connect: Callable[[], Cluster] | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Args:
        config: the list.
        connect: to the cluster; default: to the configured one.
        clock: the time now, with its time zone.
        """
        self._config = config
        self._connect = connect or (lambda: Cluster(config.submit.address))
        self._clock = clock
        self._connected: Cluster | ClusterError | None = None
        self._told: Mapping[str, str] = {}

    def look(self) -> Mapping[str, str]:
        """Does what is due, for each dataset; returns by name what kept it from that.

        One dataset's failure is no other's.
        """
        self._connected = None  # once a look, and only if it is needed
        problems = {}
        for name, dataset in self._config.datasets.items():
            try:
                self._look_at(name, dataset)
            except ObjectChanged:  # another scheduler is at it
                continue
            except Exception as error:
                problems[name] = str(error) or type(error).__name__
                if problems[name] != self._told.get(name):
                    _logger.error("%s: %s", name, problems[name])
        self._told = problems
        return problems

    def _look_at(self, name: str, dataset: DatasetConfig) -> None:
        storage, uri = make_storage(dataset.storage), state_uri(name, dataset)
        state, version = read_state(storage, uri)

        def write(changed: DatasetState) -> DatasetState:
            nonlocal version
            data = changed.model_dump_json(indent=2).encode()
            version = storage.write(uri, data, version).version
            return changed

        if state is None:
            _logger.info("%s: first seen; the next tick is its first", name)
            write(DatasetState(dataset=name, through=self._clock()))
            return
        if state.phase == "claimed":
            state = self._submit(state, dataset, write)
        if state.phase == "submitted":
            state = self._followed_up(state, write)
        due = last_tick(dataset, self._clock())
        if due <= state.through:
            return
        if state.phase == "submitted":
            skipped = Skipped(tick=due, reason=f"job {state.job} isn't over")
            _logger.info("%s: tick %s skipped: %s", name, due, skipped.reason)
            write(state.changed(through=due, skipped=skipped))
            return
        job = _submission(self._config, dataset, due).id
        claim = state.changed(through=due, phase="claimed", tick=due, job=job, problem=None)
        self._submit(write(claim), dataset, write)

    def _submit(
        self, state: DatasetState, dataset: DatasetConfig, write: Callable[[DatasetState], DatasetState]
    ) -> DatasetState:
        """Submits a claimed tick's job, if nobody has; returns the state after that."""
        assert state.tick is not None
        assert state.job is not None
        tick = state.tick
        submission = _submission(self._config, dataset, tick)
        try:
            # The configuration may have changed since the tick was claimed, and with it the job's id.
            if submission.id == state.job or self._cluster().find(state.job) is None:
                state = state.changed(job=submission.id)
                self._cluster().submit(submission)
                _logger.info("%s: tick %s submitted: %s", state.dataset, tick, state.job)
        except AlreadySubmittedError:
            pass
        except StillRunningError as error:
            _logger.info("%s: tick %s skipped: %s", state.dataset, tick, error)
            skipped = Skipped(tick=tick, reason=str(error))
            return write(state.changed(phase="over", problem=None, skipped=skipped))
        except Exception as error:
            if state.problem != str(error):
                write(state.changed(problem=str(error)))
            raise
        return write(state.changed(phase="submitted", problem=None))

    def _followed_up(
        self, state: DatasetState, write: Callable[[DatasetState], DatasetState]
    ) -> DatasetState:
        """Notes how a submitted job has ended, if it has."""
        assert state.job is not None
        job = self._cluster().find(state.job)
        if job is not None and not job.is_over:
            return state
        last = _outcome(state, job)
        _logger.info("%s: %s %s, exit status %s", state.dataset, last.job, last.state, last.exit_status)
        return write(state.changed(phase="over", last=last))

    def _cluster(self) -> Cluster:
        if self._connected is None:
            try:
                self._connected = self._connect()
            except ClusterError as error:
                self._connected = error
        if isinstance(self._connected, ClusterError):
            raise self._connected
        return self._connected


def _submission(config: DatasetsConfig, dataset: DatasetConfig, tick: datetime) -> Submission:
    to = config.submit
    selection = Selection(retry_errors=dataset.retry_errors, prune=dataset.prune)
    tick_name, python = minute_tick(tick), to.python
    # Datasets may share an output.
    return Submission(dataset.job, tick_name, selection, to.working_dir, to.requirements, python, wait=True)


def _outcome(state: DatasetState, job: Job | None) -> Outcome:
    assert state.tick is not None
    assert state.job is not None
    if job is None:
        message = "the cluster no longer knows it"
        return Outcome(tick=state.tick, job=state.job, state="LOST", message=message)
    return Outcome(
        tick=state.tick,
        job=job.id,
        state=job.state,
        exit_status=job.exit_status,
        message=job.message,
        ended_at=job.ended,
    )
