"""What is known of a dataset's ticks: an object next to its labels, changed by conditional writes only."""

from __future__ import annotations

from datetime import datetime
from typing import BinaryIO

from pydantic import BaseModel, ValidationError

from pipeline.config import DatasetConfig, make_storage
from pipeline.schedule.client import SubmittedJob
from pipeline.storage import ABSENT, StorageError


class CurrentJob(BaseModel):
    """The job of a claimed tick, until it is finished.

    Attributes:
        tick, id: the tick, and the id of its job.
        submitted: whether the cluster has the job.
        problem: why it could not be submitted at the last attempt.
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
        current: the job that is not finished.
        last: the last finished or lost job.
        skipped: the last skipped tick.
    """

    dataset: str
    through: datetime
    current: CurrentJob | None = None
    last: SubmittedJob | None = None
    skipped: Skipped | None = None

    def changed(self, **values: object) -> DatasetState:
        """Returns a copy with other values."""
        return self.model_copy(update=values)


class StateFile:
    """The object with a dataset's state.

    Attributes:
        uri: where it is.
    """

    def __init__(self, name: str, dataset: DatasetConfig) -> None:
        self.uri = f"{dataset.output.uri}/schedule-{name}.json"
        self._storage = make_storage(dataset.storage)
        self._version = ABSENT

    def read(self) -> DatasetState | None:
        """Returns the state; None before the first poll of the dataset.

        Raises:
            StorageError: it can't be read, or is not a state.
        """
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

    def write(self, state: DatasetState) -> DatasetState:
        """Replaces the version that was last read or written, and returns the new state.

        Raises:
            ObjectChanged: another scheduler has changed it.
        """
        data = state.model_dump_json(indent=2).encode()
        self._version = self._storage.write(self.uri, data, self._version).version
        return state
