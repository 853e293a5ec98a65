"""The partition of a configuration, found in storage: the model is not loaded."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.commit import Partition
from pipeline.config import Config, label_settings, make_storage
from pipeline.storage import StorageError

#: Runs of a partition that are looked at, the latest first: they differ in how they name the same model.
_RUNS = 10


def find_partition(config: Config) -> Partition:
    """The partition to which the latest run wrote whose configuration determines the same labels.

    Where a checkpoint was replaced under the same path, that is the partition of the newer checkpoint.

    Raises:
        StorageError: there is none, or it can't be read.
    """
    storage, runs = make_storage(config.storage), dict[str, str]()
    for uri in storage.folders(config.output.uri):
        partition = Partition(storage, uri, ())
        if partition.name.startswith("model="):
            for run in partition.records()[: -_RUNS - 1 : -1]:
                if _has_same_labels(config, partition.record(run) or {}):
                    runs[run] = uri
                    break
    if not runs:
        raise StorageError(
            config.output.uri,
            "nothing is labeled yet with this model and these options (or name the partition by its URI)",
        )
    return Partition.open(storage, runs[max(runs)])


def _has_same_labels(config: Config, record: Mapping[str, Any]) -> bool:
    """Whether a run's configuration determines the same labels; the model is compared by its name."""
    try:
        recorded = Config.model_validate(record.get("config"))
    except ValidationError:
        return False
    if label_settings(config) != label_settings(recorded) or config.model.labels != recorded.model.labels:
        return False
    path, revision = _model(config)
    other, other_revision = _model(recorded)
    return path == other and revision in (other_revision, record.get("model_commit"))


def _model(config: Config) -> tuple[str, str]:
    """The model's path, and the revision of a hub id, which may be part of the path."""
    path, revision = config.model.path, config.model.revision
    if not path.startswith("/") and "://" not in path:
        path, _, after = path.partition("@")
        revision = revision or after
    return path, revision or "main"
