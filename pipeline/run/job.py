"""The job: a configuration with its model loaded, its fingerprint, and its partition."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cvt.runtimes import NO_OPENVINO
from pipeline.classify.checkpoint import open_checkpoint
from pipeline.commit import Partition
from pipeline.config import NO_TORCHVISION, Config, ConfigError, fingerprint, label_settings, make_storage
from pipeline.dataflow import ResourceRequest, Stages
from pipeline.predictions import MAX_PATH_BYTES, PredictionOptions, prediction_path
from pipeline.read import ReadOptions, Shard
from pipeline.storage import Storage, room_below

if TYPE_CHECKING:
    from cvt.checkpoints import Checkpoint

#: The longest of the names that every partition has in it.
_OWN_NAME = "runs/20260101T000000.000000Z-abcdef.json"
_PREDICTIONS = "predictions/"


@dataclass(frozen=True)
class Job:
    """A labeling job: built once from its configuration, and passed to whatever runs it.

    Attributes:
        storage: access to input and output.
        checkpoint: the model, loaded.
        fingerprint: hash over everything that determines a label, in hexadecimal.
    """

    config: Config
    storage: Storage
    checkpoint: Checkpoint
    fingerprint: str
    partition: Partition

    @property
    def prediction_options(self) -> PredictionOptions:
        """What the prediction columns hold."""
        return PredictionOptions(
            labels=self.checkpoint.labels,
            topk=self.config.output.topk,
            embedding=self.config.output.embedding,
            embedding_width=self.checkpoint.embedding_width,
        )

    @property
    def resource_request(self) -> ResourceRequest:
        """What the job asks of an executor."""
        from cvt.counting import count_macs

        config, size = self.config, self.checkpoint.preprocessor.size
        count = functools.cache(functools.partial(count_macs, self.checkpoint.model.config, size, size))
        return ResourceRequest(config.read, config.decode, config.classify, size, count)

    @property
    def stages(self) -> Stages:
        """What the stages need to know."""
        config = self.config
        return Stages(
            storage=self.storage,
            read_options=ReadOptions.of(config.input, self.checkpoint.labels, config.read.fetches),
            checkpoint=self.checkpoint,
            predictions=self.prediction_options,
            max_image_pixels=config.input.max_image_pixels,
            fast_decoding=config.decode.quality == "fast",
            precision=config.model.precision,
            runtime=config.classify.runtime,
            gallery=config.report.gallery,
            thumbnail_side=config.report.thumbnail_side,
        )


def make_job(config: Config) -> Job:
    """Loads the model, and determines where its labels go; neither input nor output is accessed.

    Raises:
        CheckpointError: the model can't be loaded.
        StorageError: an object of the model can't be read.
        ConfigError: an option doesn't fit the model, or `output.uri` leaves no room for names.
    """
    model, storage = config.model, make_storage(config.storage)
    checkpoint = open_checkpoint(storage, model.path, model.revision, model.labels)
    topk, classes = config.output.topk, len(checkpoint.labels)
    if topk > classes:
        raise ConfigError(f"output.topk: {topk} is more than the model's {classes} classes")
    _check_decodable(config, checkpoint)
    digest = fingerprint(label_settings(config), checkpoint.digest)
    uri = f"{config.output.uri}/model={checkpoint.name}-{digest[:8]}"
    job = Job(config, storage, checkpoint, digest, Partition(storage, uri, checkpoint.labels))
    _check_room(job.partition, "what each run writes", _OWN_NAME)
    return job


def check_installed(config: Config) -> None:
    """Reports a missing package at once, not from within a worker; nodes are alike.

    Raises:
        ConfigError: names the package to install.
    """
    runtime = config.classify.runtime
    if runtime == "openvino" and importlib.util.find_spec(runtime) is None:
        raise ConfigError(f"classify.runtime: {NO_OPENVINO}")
    decodes_on_gpu = config.decode.resolved_device(config.classify.device) == "gpu"
    if decodes_on_gpu and importlib.util.find_spec("torchvision") is None:
        message = f"the GPU decodes by torchvision, which is missing: {NO_TORCHVISION}"
        raise ConfigError(f"decode.device: {message}")


def _check_decodable(config: Config, checkpoint: Checkpoint) -> None:
    """Reports at once whether a GPU can do this model's preprocessing."""
    if config.decode.resolved_device(config.classify.device) == "gpu":
        from cvt.inference.device_preprocessing import DevicePreprocessor

        try:
            DevicePreprocessor(checkpoint.preprocessor)
        except ValueError as error:
            raise ConfigError(f"decode.device: {error}") from error


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
