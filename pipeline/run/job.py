"""The job: a configuration with its loaded model, its fingerprint and its partition."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cvt.architecture import count_macs
from cvt.runtimes import OPENVINO_MISSING, openvino_is_installed
from pipeline.classify.checkpoint import open_checkpoint
from pipeline.commit import Partition
from pipeline.config import NO_TORCHVISION, Config, ConfigError, InputConfig, make_storage
from pipeline.dataflow import ResourceRequest, Stages
from pipeline.predictions import PredictionOptions, carried_column
from pipeline.read import ReadOptions, load_targets
from pipeline.storage import Storage

if TYPE_CHECKING:
    from cvt.checkpoints import Checkpoint


@dataclass(frozen=True)
class Job:
    """A labeling job: built once from its configuration, and passed to each step.

    The fingerprint is a hash over everything that determines a label, in hexadecimal. `input` is the section
    of the configuration with the content of its files. `labeled_by` is the runtime of the stored labels, if
    `classify.runtime: auto` needs it.
    """

    config: Config
    storage: Storage
    checkpoint: Checkpoint
    fingerprint: str
    partition: Partition
    input: InputConfig
    labeled_by: str | None = None

    @property
    def topk(self) -> int:
        """Number of classes that each row keeps: `output.topk`, or all classes of a smaller model."""
        return min(self.config.output.topk, len(self.checkpoint.labels))

    @property
    def resource_request(self) -> ResourceRequest:
        """The resources that the job requests from an executor."""
        config, checkpoint, size = self.config, self.checkpoint, self.checkpoint.preprocessor.size
        macs = count_macs(checkpoint.architecture, len(checkpoint.labels), size)
        precision = config.model.precision
        return ResourceRequest(
            config.read, config.decode, config.classify, size, macs, precision, self.labeled_by
        )

    @property
    def stages(self) -> Stages:
        """The settings of the stages."""
        config, labels = self.config, self.checkpoint.labels
        # Each read task has a copy of the options, and the list of URIs may be long.
        section = self.input.model_copy(update={"uri": "", "exclude": []})
        return Stages(
            storage=self.storage,
            read_options=ReadOptions(section, config.read, labels),
            checkpoint=self.checkpoint,
            predictions=PredictionOptions(
                labels,
                self.topk,
                config.output.embedding,
                self.checkpoint.embedding_width,
                config.output.label_names,
                config.input.carry,
            ),
            precision=config.model.precision,
            decode=config.decode,
            classify=config.classify,
            report=config.report,
        )


def make_job(config: Config) -> Job:
    """Loads the model and the files of targets, and determines its partition; reads no shard and no output.

    Raises `CheckpointError`, `StorageError` of a file, or `ConfigError`: an option does not fit the model.
    """
    _check_carried_columns(config.input.carry)
    model, storage = config.model, make_storage(config.storage)
    checkpoint = open_checkpoint(storage, model.path, model.revision, model.labels)
    checkpoint.check_single_label()
    if config.decode.device == "gpu":  # a GPU does not support every preprocessing
        try:
            checkpoint.preprocessor.torch_filter()
        except ValueError as error:
            raise ConfigError(f"decode.device: {error}") from error
    section = load_targets(storage, config.input, checkpoint.labels)
    fingerprint = config.model_copy(update={"input": section}).fingerprint(checkpoint.digest)
    uri = f"{config.output.uri}/model={checkpoint.name}-{fingerprint[:8]}"
    partition = Partition(storage, uri, checkpoint.labels)
    return Job(config, storage, checkpoint, fingerprint, partition, section)


def _check_carried_columns(carry: Iterable[str]) -> None:
    """Raises `ConfigError` for two names of one column; engines of SQL ignore the case of names."""
    names = dict[str, str]()
    for name in carry:
        column = carried_column(name)
        if (other := names.setdefault(column.lower(), name)) != name:
            problem = f"{other!r} and {name!r} are names of the same column {column!r}"
            raise ConfigError(f"input.carry: {problem}; remove one")


def check_installed(config: Config) -> None:
    """Raises `ConfigError` if a package is missing here, and so on the workers."""
    runtimes = {pool.runtime for pool in config.classify.each_pool}
    if "openvino" in runtimes and not openvino_is_installed():
        raise ConfigError(f"classify.runtime: {OPENVINO_MISSING}")
    if config.decode.device == "gpu" and importlib.util.find_spec("torchvision") is None:
        raise ConfigError(f"decode.device: decoding on a GPU needs torchvision: {NO_TORCHVISION}")
