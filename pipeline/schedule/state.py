"""What is known of a dataset's ticks: an object next to its labels, changed by conditional writes only."""

from datetime import datetime
from typing import BinaryIO

from pydantic import BaseModel, ValidationError

from pipeline.config import DatasetConfig, make_storage
from pipeline.schedule.client import SubmittedJob
from pipeline.storage import ABSENT, StorageError


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
