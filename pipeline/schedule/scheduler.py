"""Submits a labeling job for each dataset of a list when the dataset is due, once per scheduled time.

The job's id derives from the scheduled time, the cluster accepts an id once, and state files change by
conditional writes only. So a scheduler may die at any point, and several may run at the same time.
"""

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel

from pipeline.config import DatasetConfig, ScheduleConfig, Selection, make_storage
from pipeline.dataflow import ClusterError
from pipeline.schedule.client import (
    AlreadySubmittedError,
    JobClient,
    StillRunningError,
    Submission,
    SubmittedJob,
    UnknownJobError,
    minute_key,
)
from pipeline.storage import ABSENT, ObjectChanged, content_errors
from pipeline.text import remove_secrets

_logger = logging.getLogger("cvt_label")

_MAX_STATE_BYTES = 1024**2


class CurrentJob(BaseModel):
    """The job of the last scheduled time, until the job is known to be finished."""

    scheduled_time: datetime
    id: str


class SkippedTime(BaseModel):
    """A scheduled time without a submission, and the reason."""

    scheduled_time: datetime
    reason: str


class DatasetState(BaseModel):
    """The scheduler's state of a dataset.

    Attributes:
        handled_until: scheduled times up to this time are submitted or skipped.
        last_job: the last finished or lost job.
        last_error: why the last submission failed; None after a submission.
    """

    dataset: str
    handled_until: datetime
    current_job: CurrentJob | None = None
    last_job: SubmittedJob | None = None
    last_skipped: SkippedTime | None = None
    last_error: str | None = None


class StateFile:
    """The stored object that contains a dataset's state."""

    def __init__(self, name: str, dataset: DatasetConfig) -> None:
        self.uri = f"{dataset.output.uri}/schedule-{name}.json"
        self._storage = make_storage(dataset.storage)
        self._version = ABSENT

    def read(self) -> DatasetState | None:
        """Returns the state, or None before the first poll of the dataset. Raises `StorageError`."""
        with content_errors(self.uri, "a schedule state file"):
            found = self._storage.read_latest(
                self.uri, lambda file: DatasetState.model_validate_json(file.read()), _MAX_STATE_BYTES
            )
        self._version = ABSENT if found is None else found.version
        return None if found is None else found.content

    def write(self, state: DatasetState, **changes: object) -> DatasetState:
        """Writes and returns the changed state; raises `ObjectChanged` if another scheduler wrote first."""
        state = state.model_copy(update=changes)
        data = state.model_dump_json(indent=2).encode()
        known = self._version
        written = self._storage.update(self.uri, lambda now: data if now == known else None, known)
        if written is None:
            raise ObjectChanged(self.uri, "another scheduler has written the state")
        self._version = written.version
        return state


def next_scheduled_times(dataset: DatasetConfig, now: datetime, count: int) -> list[datetime]:
    """Returns the next scheduled times of a dataset, in the dataset's time zone."""
    times = _iterate_times(dataset, now)
    return [times.get_next(datetime) for _ in range(count)]


def last_scheduled_time(dataset: DatasetConfig, now: datetime) -> datetime:
    """Returns the last scheduled time of a dataset that is not after `now`, in UTC."""
    after = now.replace(microsecond=0) + timedelta(seconds=1)
    last: datetime = _iterate_times(dataset, after).get_prev(datetime)
    return last.astimezone(UTC)


def _iterate_times(dataset: DatasetConfig, start: datetime) -> Any:
    # croniter is an optional dependency. Without it, no configuration with a cron expression is valid.
    from croniter import croniter

    return croniter(dataset.cron, start.astimezone(dataset.timezone))


class Scheduler:
    """Polls the datasets of a list and submits the jobs that are due, to the configured cluster."""

    def __init__(
        self,
        config: ScheduleConfig,
        connect: Callable[[], JobClient] | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._config = config
        self._connect = connect or (lambda: JobClient(config.submit.address))
        self._clock = clock
        self._connection: JobClient | ClusterError | None = None
        self._logged_errors: Mapping[str, str] = {}

    def poll(self) -> Mapping[str, str]:
        """Polls each dataset, independently of errors of others; returns errors by the dataset's name."""
        self._connection = None
        errors = {}
        for name, dataset in self._config.datasets.items():
            try:
                self._poll(StateFile(name, dataset), name, dataset)
            except ObjectChanged:  # another scheduler polls this dataset
                continue
            except Exception as error:
                errors[name] = str(error) or type(error).__name__
                if errors[name] != self._logged_errors.get(name):
                    _logger.error("%s: %s", name, errors[name])
        self._logged_errors = errors
        return errors

    def _poll(self, file: StateFile, name: str, dataset: DatasetConfig) -> None:
        state = file.read()
        if state is None:
            _logger.info("%s: added; its first job runs at the next scheduled time", name)
            file.write(DatasetState(dataset=name, handled_until=self._clock()))
            return
        if state.current_job is not None:
            state = self._update_finished(file, state, state.current_job)
        due = last_scheduled_time(dataset, self._clock())
        if due <= state.handled_until:
            return
        selection = Selection(retry_errors=dataset.retry_errors, prune=dataset.prune)
        # Datasets may share an output. Their jobs then wait for each other.
        submission = Submission(dataset.job, minute_key(due), selection, self._config.submit, wait=True)
        job = CurrentJob(scheduled_time=due, id=submission.id)
        changes: dict[str, object] = {"handled_until": due, "current_job": job, "last_error": None}
        try:
            if state.current_job is not None:
                raise StillRunningError(f"job {state.current_job.id} is not finished")
            self._client().submit(submission)
            _logger.info("%s: job for %s submitted: %s", name, due, submission.id)
        except AlreadySubmittedError:  # by another scheduler, or by one that died before it wrote the state
            pass
        except StillRunningError as error:
            _logger.info("%s: scheduled time %s skipped: %s", name, due, error)
            del changes["current_job"]
            changes["last_skipped"] = SkippedTime(scheduled_time=due, reason=str(error))
        except Exception as error:
            if state.last_error != (message := remove_secrets(str(error))):
                file.write(state, last_error=message)
            raise
        file.write(state, **changes)

    def _update_finished(self, file: StateFile, state: DatasetState, current: CurrentJob) -> DatasetState:
        """Writes the outcome of a submitted job if the job is finished; returns the new state."""
        try:
            job = self._client().job(current.id)
        except UnknownJobError:
            job = SubmittedJob(current.id, "LOST", "the cluster no longer has this job")
        if not job.is_finished:
            return state
        _logger.info("%s: %s %s, exit status %s", state.dataset, job.id, job.state, job.exit_status)
        return file.write(state, current_job=None, last_job=job)

    def _client(self) -> JobClient:
        """Returns the client of the cluster; connects at most once per poll, also after an error."""
        try:
            self._connection = self._connection or self._connect()
        except ClusterError as error:
            self._connection = error
        if isinstance(self._connection, ClusterError):
            raise self._connection
        return self._connection
