"""Submits a labeling job for each dataset of a list when the dataset is due, once per scheduled time.

A poll writes a claim for the scheduled time, submits the job, and writes that the job is submitted. A later
poll writes how the job ended. All state of a scheduler is in the datasets' state files. These change by
conditional writes only. The job's id derives from the scheduled time, and the cluster accepts an id once.
Therefore a scheduler may die at any point, and several may run at the same time.
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
    minute_key,
)
from pipeline.storage import ABSENT, ObjectChanged, StorageError
from pipeline.text import remove_secrets

_logger = logging.getLogger("cvt_label")

_MAX_STATE_BYTES = 1024**2


class CurrentJob(BaseModel):
    """The job of a claimed scheduled time, until the job is finished.

    Attributes:
        submitted: whether the job is known to be on the cluster.
        error: why the last submission attempt failed.
    """

    scheduled_time: datetime
    id: str
    submitted: bool = False
    error: str | None = None


class SkippedTime(BaseModel):
    """A scheduled time without a submission, and the reason."""

    scheduled_time: datetime
    reason: str


class DatasetState(BaseModel):
    """The scheduler's state of a dataset.

    Attributes:
        handled_until: scheduled times up to this time are claimed or skipped.
        last_job: the last finished or lost job.
    """

    dataset: str
    handled_until: datetime
    current_job: CurrentJob | None = None
    last_job: SubmittedJob | None = None
    last_skipped: SkippedTime | None = None


class StateFile:
    """The stored object that contains a dataset's state."""

    def __init__(self, name: str, dataset: DatasetConfig) -> None:
        self.uri = f"{dataset.output.uri}/schedule-{name}.json"
        self._storage = make_storage(dataset.storage)
        self._version = ABSENT

    def read(self) -> DatasetState | None:
        """Returns the state, or None before the first poll of the dataset. Raises `StorageError`."""
        found = self._storage.read_latest(self.uri, self._parse, _MAX_STATE_BYTES)
        self._version = ABSENT if found is None else found.version
        return None if found is None else found.content

    def _parse(self, file: BinaryIO) -> DatasetState:
        try:
            return DatasetState.model_validate_json(file.read())
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            cause = f"field {field}: {first['msg']}" if field else first["msg"]
            raise StorageError(self.uri, f"not a schedule state file: {cause}") from None

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
    """Polls the datasets of a list and submits the jobs that are due.

    Args:
        connect: connects to the cluster; by default to the cluster of the configuration.
        clock: returns the current time.
    """

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
        """Polls each dataset and submits the jobs that are due; returns errors by the dataset's name.

        An error of one dataset does not affect the others.
        """
        self._connection = None  # connects at most once per poll, and only if needed
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
        if state.current_job is not None and not state.current_job.submitted:
            state = self._submit(file, state, state.current_job, dataset)
        if state.current_job is not None:
            state = self._update_finished(file, state, state.current_job)
        due = last_scheduled_time(dataset, self._clock())
        if due <= state.handled_until:
            return
        if state.current_job is not None:
            skipped = SkippedTime(scheduled_time=due, reason=f"job {state.current_job.id} is not finished")
            _logger.info("%s: scheduled time %s skipped: %s", name, due, skipped.reason)
            file.write(state, handled_until=due, last_skipped=skipped)
            return
        claim = CurrentJob(scheduled_time=due, id=self._submission(dataset, due).id)
        self._submit(file, file.write(state, handled_until=due, current_job=claim), claim, dataset)

    def _submit(
        self, file: StateFile, state: DatasetState, claim: CurrentJob, dataset: DatasetConfig
    ) -> DatasetState:
        """Submits the job of a claimed scheduled time unless it is on the cluster; returns the new state."""
        submission, job_id = self._submission(dataset, claim.scheduled_time), claim.id
        try:
            # The job's id differs from the claimed id if the configuration has changed since the claim.
            if submission.id == job_id or self._client().find(job_id) is None:
                job_id = submission.id
                self._client().submit(submission)
                _logger.info("%s: job for %s submitted: %s", state.dataset, claim.scheduled_time, job_id)
        except AlreadySubmittedError:
            pass
        except StillRunningError as error:
            _logger.info("%s: scheduled time %s skipped: %s", state.dataset, claim.scheduled_time, error)
            skipped = SkippedTime(scheduled_time=claim.scheduled_time, reason=str(error))
            return file.write(state, current_job=None, last_skipped=skipped)
        except Exception as error:
            if claim.error != (message := remove_secrets(str(error))):
                file.write(state, current_job=claim.model_copy(update={"error": message}))
            raise
        submitted = CurrentJob(scheduled_time=claim.scheduled_time, id=job_id, submitted=True)
        return file.write(state, current_job=submitted)

    def _update_finished(self, file: StateFile, state: DatasetState, current: CurrentJob) -> DatasetState:
        """Writes the outcome of a submitted job if the job is finished; returns the new state."""
        lost = SubmittedJob(current.id, "LOST", "the cluster no longer has this job")
        job = self._client().find(current.id) or lost
        if not job.is_finished:
            return state
        _logger.info("%s: %s %s, exit status %s", state.dataset, job.id, job.state, job.exit_status)
        return file.write(state, current_job=None, last_job=job)

    def _client(self) -> JobClient:
        if self._connection is None:
            try:
                self._connection = self._connect()
            except ClusterError as error:
                self._connection = error
        if isinstance(self._connection, ClusterError):
            raise self._connection
        return self._connection

    def _submission(self, dataset: DatasetConfig, scheduled_time: datetime) -> Submission:
        selection = Selection(retry_errors=dataset.retry_errors, prune=dataset.prune)
        # Datasets may share an output. Their jobs then wait for each other.
        return Submission(dataset.job, minute_key(scheduled_time), selection, self._config.submit, wait=True)
