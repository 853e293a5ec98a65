"""The partition of a configuration, found in storage: the model is not loaded."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from pydantic import ValidationError

from pipeline.commit import Partition
from pipeline.config import Config, label_settings, make_storage
from pipeline.storage import StorageError


def find_partition(config: Config) -> Partition:
    """The partition to which the latest run wrote whose configuration determines the same labels.

    Where a checkpoint was replaced under the same path, that is the partition of the newer checkpoint.

    Raises:
        StorageError: there is none, or it can't be read.
    """
    storage, wanted = make_storage(config.storage), _settings(config)
    runs: dict[str, str] = {}
    for uri in storage.folders(config.output.uri):
        partition = Partition(storage, uri, ())
        if partition.name.startswith("model="):
            found = (run for run, recorded in _recorded(partition) if _settings(recorded) == wanted)
            runs.update((run, uri) for run in islice(found, 1))
    if not runs:
        raise StorageError(
            config.output.uri,
            "nothing is labeled yet with this model and these options (or name the partition by its URI)",
        )
    return Partition.open(storage, runs[max(runs)])


def _settings(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """What determines the labels of a configuration, with the model by its name."""
    return label_settings(config), config.model.model_dump(exclude={"precision"})


def _recorded(partition: Partition) -> Iterator[tuple[str, Config]]:
    """The runs of a partition, the latest first, with their configurations."""
    for run in reversed(partition.records()):
        record = partition.record(run) or {}
        try:
            yield run, Config.model_validate(record.get("config"))
        except ValidationError:
            continue
