"""Submits a job for each dataset of a list when the dataset is due, once per tick.

A poll writes that a tick is claimed, submits its job, and writes that the job is submitted, and later how the
job ended. All that a scheduler knows is in the datasets' states, which it changes by conditional writes. The
job's id derives from the tick, and the cluster accepts an id once. So a scheduler may die at any point, and
several may run at once; docs/operating.md has the table.
"""

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO

from pydantic import BaseModel, ValidationError

from pipeline.config import DatasetConfig, ScheduleConfig, Selection, make_storage
from pipeline.dataflow import ClusterError
from pipeline.schedule.client import (
    AlreadySubmittedError,
    JobClient,
    StillRunningError,
    Submission,
    SubmittedJob,
    minute_tick,
)
from pipeline.storage import ABSENT, ObjectChanged, StorageError

_logger = logging.getLogger("cvt_label")


class CurrentJob(BaseModel):
    """The job of a claimed tick, until it is finished.

    Attributes:
        submitted: whether the cluster has the job.
        problem: why the job could not be submitted at the last attempt.
    """

    tick: datetime
    id: str
    submitted: bool = False
    problem: str | None = None


class Skipped(BaseModel):
    """A tick for which nothing was submitted, and why."""

    tick: datetime
    reason: str


class DatasetState(BaseModel):
    """What is known of a dataset's ticks.

    Attributes:
        through: ticks up to this moment are claimed or skipped.
        last: the last finished or lost job.
        skipped: the last skipped tick.
    """

    dataset: str
    through: datetime
    current: CurrentJob | None = None
    last: SubmittedJob | None = None
    skipped: Skipped | None = None


class StateFile:
    """The object with a dataset's state."""

    def __init__(self, name: str, dataset: DatasetConfig) -> None:
        self.uri = f"{dataset.output.uri}/schedule-{name}.json"
        self._storage = make_storage(dataset.storage)
        self._version = ABSENT

    def read(self) -> DatasetState | None:
        """Returns the state; None before the first poll of the dataset. Raises `StorageError`."""
        found = self._storage.read_latest(self.uri, self._parse)
        self._version = ABSENT if found is None else found.version
        return None if found is None else found.content

    def _parse(self, file: BinaryIO) -> DatasetState:
        try:
            return DatasetState.model_validate_json(file.read())
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the whole"
            raise StorageError(self.uri, f"not a schedule's state: {field}: {first['msg']}") from None

    def write(self, state: DatasetState, **changes: object) -> DatasetState:
        """Writes and returns the changed state; raises `ObjectChanged` if another scheduler was faster."""
        state = state.model_copy(update=changes)
        data = state.model_dump_json(indent=2).encode()
        self._version = self._storage.write(self.uri, data, self._version).version
        return state


def next_ticks(dataset: DatasetConfig, now: datetime, count: int) -> list[datetime]:
    """Returns the next times at which a dataset is due, in its time zone."""
    times = _times(dataset, now)
    return [times.get_next(datetime) for _ in range(count)]


def last_tick(dataset: DatasetConfig, now: datetime) -> datetime:
    """Returns the last time at which a dataset was due, in UTC, `now` included."""
    after = now.replace(microsecond=0) + timedelta(seconds=1)
    last: datetime = _times(dataset, after).get_prev(datetime)
    return last.astimezone(UTC)


def _times(dataset: DatasetConfig, start: datetime) -> Any:
    from croniter import croniter  # of an extra; a configuration with a schedule is not valid without it

    return croniter(dataset.cron, start.astimezone(dataset.timezone))


class Scheduler:
    """Polls the datasets of a list, and submits what is due, by default to the configured cluster."""

    def __init__(
        self,
        config: ScheduleConfig,
        connect: Callable[[], JobClient] | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._config = config
        self._connect = connect or (lambda: JobClient(config.submit.address))
        self._clock = clock
        self._connected: JobClient | ClusterError | None = None
        self._reported: Mapping[str, str] = {}

    def poll(self) -> Mapping[str, str]:
        """Does what is due for each dataset; returns, by the dataset's name, what prevented it.

        A failure of one dataset does not affect the others.
        """
        self._connected = None  # at most once per poll, and only if needed
        problems = {}
        for name, dataset in self._config.datasets.items():
            try:
                self._poll(StateFile(name, dataset), name, dataset)
            except ObjectChanged:  # another scheduler does it
                continue
            except Exception as error:
                problems[name] = str(error) or type(error).__name__
                if problems[name] != self._reported.get(name):
                    _logger.error("%s: %s", name, problems[name])
        self._reported = problems
        return problems

    def _poll(self, file: StateFile, name: str, dataset: DatasetConfig) -> None:
        state = file.read()
        if state is None:
            _logger.info("%s: added; the next tick is its first", name)
            file.write(DatasetState(dataset=name, through=self._clock()))
            return
        if state.current is not None and not state.current.submitted:
            state = self._submit(file, state, state.current, dataset)
        if state.current is not None:
            state = self._follow_up(file, state, state.current)
        due = last_tick(dataset, self._clock())
        if due <= state.through:
            return
        if state.current is not None:
            skipped = Skipped(tick=due, reason=f"job {state.current.id} is not finished")
            _logger.info("%s: tick %s skipped: %s", name, due, skipped.reason)
            file.write(state, through=due, skipped=skipped)
            return
        claim = CurrentJob(tick=due, id=self._submission(dataset, due).id)
        self._submit(file, file.write(state, through=due, current=claim), claim, dataset)

    def _submit(
        self, file: StateFile, state: DatasetState, claim: CurrentJob, dataset: DatasetConfig
    ) -> DatasetState:
        """Submits the job of a claimed tick, if no scheduler has; returns the new state."""
        submission, name = self._submission(dataset, claim.tick), claim.id
        try:
            # If the configuration has changed since the tick was claimed, the id of its job has, too.
            if submission.id == name or self._client().find(name) is None:
                name = submission.id
                self._client().submit(submission)
                _logger.info("%s: tick %s submitted: %s", state.dataset, claim.tick, name)
        except AlreadySubmittedError:
            pass
        except StillRunningError as error:
            _logger.info("%s: tick %s skipped: %s", state.dataset, claim.tick, error)
            skipped = Skipped(tick=claim.tick, reason=str(error))
            return file.write(state, current=None, skipped=skipped)
        except Exception as error:
            if claim.problem != str(error):
                failed = claim.model_copy(update={"problem": str(error)})
                file.write(state, current=failed)
            raise
        return file.write(state, current=CurrentJob(tick=claim.tick, id=name, submitted=True))

    def _follow_up(self, file: StateFile, state: DatasetState, current: CurrentJob) -> DatasetState:
        """Writes how a submitted job ended, if it has."""
        lost = SubmittedJob(current.id, "LOST", "the cluster no longer knows it")
        last = self._client().find(current.id) or lost
        if not last.is_finished:
            return state
        _logger.info("%s: %s %s, exit status %s", state.dataset, last.id, last.state, last.exit_status)
        return file.write(state, current=None, last=last)

    def _client(self) -> JobClient:
        if self._connected is None:
            try:
                self._connected = self._connect()
            except ClusterError as error:
                self._connected = error
        if isinstance(self._connected, ClusterError):
            raise self._connected
        return self._connected

    def _submission(self, dataset: DatasetConfig, tick: datetime) -> Submission:
        selection = Selection(retry_errors=dataset.retry_errors, prune=dataset.prune)
        # Datasets may share an output: their jobs wait for each other.
        return Submission(dataset.job, minute_tick(tick), selection, self._config.submit, wait=True)
