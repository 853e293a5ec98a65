"""A partition of the output: one model with one set of options, its fingerprint, and how to reach it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.classifying import PredictionOptions
from pipeline.committing import Target
from pipeline.config import Config, ConfigError, InputConfig, StorageConfig
from pipeline.manifest import Manifest
from pipeline.model_files import open_checkpoint
from pipeline.reading import ReadOptions
from pipeline.shards import MAX_PATH_BYTES, Shard, prediction_path
from pipeline.statistics import ClassStatistics, class_table
from pipeline.storage import Storage, normalised, room_below

if TYPE_CHECKING:
    from cvt.checkpoints import Checkpoint

#: The longest of the names that every partition has in it.
_OWN_NAME = "runs/20260101T000000.000000Z-abcdef.json"
_PREDICTIONS = "predictions/"


@dataclass(frozen=True)
class Partition:
    """The output of one model with one set of options, and how to reach it.

    Attributes:
        config: the job's configuration.
        storage: access to input and output.
        checkpoint: the model, loaded.
        fingerprint: hash over everything that decides a label, in hexadecimal.
    """

    config: Config
    storage: Storage
    checkpoint: Checkpoint
    fingerprint: str

    @property
    def model(self) -> str:
        """What tells it from other partitions, and is the value of the column `model` for their readers."""
        return f"{self.checkpoint.name}-{self.fingerprint[:8]}"

    @property
    def uri(self) -> str:
        """Where it lies, without a slash at the end."""
        return f"{normalised(self.config.output.uri)}/model={self.model}"

    @property
    def manifest(self) -> Manifest:
        """What is labelled."""
        return Manifest(self.storage, self.uri, len(self.checkpoint.labels))

    @property
    def target(self) -> Target:
        """Where its prediction files go."""
        return Target(self.storage, self.uri, self.fingerprint, self.prediction_options)

    @property
    def prediction_options(self) -> PredictionOptions:
        """What the prediction columns are."""
        return PredictionOptions(
            labels=self.checkpoint.labels,
            topk=self.config.output.topk,
            embedding=self.config.output.embedding,
            embedding_width=self.checkpoint.embedding_width,
        )

    @property
    def read_options(self) -> ReadOptions:
        """What readers need to know of the input, and of the model's classes."""
        return read_options(self.config.input, self.checkpoint.labels, self.config.read.fetches)

    def class_table(self, stats: ClassStatistics) -> pa.Table:
        """Statistics as `class_stats.parquet` holds them."""
        return class_table(stats, self.checkpoint.labels, self.config.output.topk)


def open_partition(config: Config) -> Partition:
    """Loads the model, and finds where its labels go; neither input nor output is touched.

    Raises:
        CheckpointError: the model can't be loaded.
        StorageError: an object of the model can't be read.
        ConfigError: an option doesn't fit the model, or `output.uri` leaves no room for names.
    """
    model, storage = config.model, make_storage(config.storage)
    checkpoint = open_checkpoint(storage, model.path, model.revision, model.labels)
    if config.output.topk > len(checkpoint.labels):
        raise ConfigError(
            f"output.topk: {config.output.topk} is more than the model's {len(checkpoint.labels)} classes"
        )
    partition = Partition(config, storage, checkpoint, _fingerprint(config, checkpoint))
    _check_room(partition, "what each run writes", _OWN_NAME)
    return partition


def check_room(partition: Partition, shards: Iterable[Shard]) -> None:
    """Makes sure that the prediction files of these shards can have their names where the labels go.

    Raises:
        ConfigError: one of them would be too long for the storage.
    """
    if room_below(partition.uri) >= len(_PREDICTIONS) + MAX_PATH_BYTES:
        return
    for shard in shards:
        _check_room(partition, shard.uri, f"{_PREDICTIONS}{prediction_path(shard.uri)}")


def _check_room(partition: Partition, what: str, name: str) -> None:
    room, needed = room_below(partition.uri), len(name.encode())
    if needed > room:
        raise ConfigError(
            f"output.uri: too long: a name below {partition.uri} may have {max(room, 0)} bytes, and that of "
            f"{what} has {needed}"
        )


def make_storage(section: StorageConfig) -> Storage:
    """The storage that the configuration describes."""
    return Storage(endpoint_url=section.endpoint_url, region=section.region)


def read_options(section: InputConfig, labels: Sequence[str], fetches: int = 4) -> ReadOptions:
    """What readers need to know of the input, and of the model's classes.

    Of classes that share a name, as ImageNet's two cranes do, none is told by it.
    """
    times = Counter(labels)
    return ReadOptions(
        labels=section.labels,
        label_field=section.label_field,
        image_column=section.image_column,
        label_column=section.label_column,
        key_column=section.key_column,
        class_ids=tuple((name, i) for i, name in enumerate(labels) if times[name] == 1),
        num_labels=len(labels),
        max_image_bytes=section.max_image_bytes,
        fetches=fetches,
    )


def _fingerprint(config: Config, checkpoint: Checkpoint) -> str:
    """SHA-256 over what decides a row: not where it is read, nor how the work is spread."""
    from cvt.engine import resolve_precision

    decides: dict[str, Any] = {
        "checkpoint": checkpoint.digest,
        "precision": resolve_precision(config.model.precision, config.classify.device),
        "output": config.output.model_dump(exclude={"uri"}),
        "input": config.input.model_dump(exclude={"uri", "format"}),
    }
    decoder = config.decode.resolved_device(config.classify.device), config.decode.quality
    if decoder != ("cpu", "exact"):
        decides["decode"] = decoder
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
