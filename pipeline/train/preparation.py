"""Prepares a training without Ray: the model, the shards, and the state of an interrupted training."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from cvt.architecture import FIELDS, transformers_problem
from cvt.checkpoints.checkpoint import label_fields
from cvt.errors import checkpoint_errors
from cvt.modeling import CvtConfig, CvtForImageClassification, preset_config
from cvt.preprocessing import Preprocessor
from pipeline.classify.checkpoint import open_checkpoint
from pipeline.config import ConfigError, TrainConfig, make_storage
from pipeline.read import Shard, list_input_shards, load_targets
from pipeline.storage import ABSENT, ObjectChanged, Storage, StorageError

#: Fields of `optimization` on which the training state or the order of the images depends.
_FIXED_FIELDS = {"learning_rate", "weight_decay", "warmup_epochs", "shuffle_buffer", "seed"}

logger = logging.getLogger("cvt_label")


class TrainingModel(NamedTuple):
    """A model, its preprocessor, and the digest of the checkpoint that the weights are from."""

    model: CvtForImageClassification
    preprocessor: Preprocessor
    pretrained: str | None = None


@dataclass(frozen=True)
class PreparedTraining:
    """The parts of a training that are prepared without Ray.

    Attributes:
        shards: the shards of the sections `train` and `validation`.
        settings: what a resumed training must keep: values as JSON, by field.
        state: the state of the interrupted training; None for a new training.
        version: the version of the object with the state, or `ABSENT`.
    """

    config: TrainConfig
    storage: Storage
    model: TrainingModel
    shards: Mapping[str, Sequence[Shard]]
    settings: Mapping[str, str]
    state: Mapping[str, Any] | None
    version: str


def prepare_training(config: TrainConfig) -> PreparedTraining:
    """Loads the model, lists the shards, and reads the state; see `train_model` for the errors."""
    storage, model = make_storage(config.storage), make_training_model(config)
    labels = list(model.model.config.id2label.values())
    sections = ("train", "validation")
    inputs = {name: load_targets(storage, getattr(config, name), labels, name) for name in sections}
    config = config.model_copy(update=inputs)
    shards = {name: list_input_shards(storage, section, f"{name}.uri") for name, section in inputs.items()}
    settings = _settings(config, model, shards)
    return PreparedTraining(config, storage, model, shards, settings, *_read_state(storage, config, settings))


def _settings(
    config: TrainConfig, model: TrainingModel, shards: Mapping[str, Sequence[Shard]]
) -> dict[str, str]:
    """Returns what determines architecture, dataset and order of a training: values as JSON, by field."""
    architecture = {name: getattr(model.model.config, name) for name in FIELDS}
    labels = list(model.model.config.id2label.values())
    sections: dict[str, dict[str, Any]] = {
        "model": {**architecture, "labels": labels, "pretrained": model.pretrained},
        "preprocessor": model.preprocessor.to_dict(),
        "optimization": config.optimization.model_dump(include=_FIXED_FIELDS),
        "workers": {"count * optimization.batch_size": config.images_per_step},
    }
    for name, listed in shards.items():
        versions = json.dumps([(shard.uri, shard.version) for shard in listed]).encode()
        digest = f"{len(listed)} with digest {hashlib.sha256(versions).hexdigest()[:8]}"
        sections[name] = {**getattr(config, name).model_dump(), "shards": digest}
    return {f"{a}.{b}": json.dumps(value) for a, fields in sections.items() for b, value in fields.items()}


def _read_state(
    storage: Storage, config: TrainConfig, settings: Mapping[str, str]
) -> tuple[Mapping[str, Any] | None, str]:
    """Returns the state and its version; None and `ABSENT` for a new training."""
    differences = ["the state is missing"]
    found = storage.read_latest(config.state_uri, lambda file: file.read())
    if found is None and next(storage.list(config.model_uri), None) is None:
        return None, ABSENT
    if found is not None:
        with checkpoint_errors(f"{config.state_uri}: not the state of a training"):
            state: dict[str, Any] = torch.load(io.BytesIO(found.content), "cpu", weights_only=True)
            kept, *_ = (state[name] for name in ("settings", "epoch", "best"))
            differences = [
                f"{name} was {kept[name]:.60}, and is now {settings[name]:.60}"
                for name in sorted(kept.keys() & settings.keys())
                if kept[name] != settings[name]
            ]
        if not differences:
            return state, found.version
    raise ConfigError(
        f"output: cannot resume the training in {config.folder}: {'; '.join(differences)}. Restore the "
        "settings, set another output.name, or delete the folder"
    )


def write_output(prepared: PreparedTraining, version: str, uri: str, content: bytes) -> str:
    """Writes the state of a training, or a file of its model; returns the new version of the state.

    Raises:
        StorageError: the state no longer has `version`, or the object cannot be written.
    """
    storage, state_uri = prepared.storage, prepared.config.state_uri
    try:
        if uri == state_uri:
            return storage.write(uri, content, version).version
        if storage.version(state_uri) == version:
            storage.write(uri, content)
            return version
    except ObjectChanged:  # also if the response to this write was lost
        found = storage.read_latest(uri, lambda file: file.read())
        if found is not None and found.content == content:
            return found.version
    cause = "another training writes to this output: run only one, or set another output.name"
    raise StorageError(state_uri, cause)


@dataclass(frozen=True)
class TrainResult:
    """The result of a training.

    Attributes:
        path: path or URI of the folder with the best model, in the format that labeling loads.
        best: metrics of the best model's epoch.
    """

    path: str
    best: Mapping[str, float]


def make_training_model(config: TrainConfig) -> TrainingModel:
    """Creates the configured new model, or loads the configured checkpoint; see `train_model` for errors."""
    torch.manual_seed(config.optimization.seed)
    if (new := config.model.new) is not None:
        unknown = sorted(new.cvt.keys() - set(FIELDS))
        if unknown:
            raise ConfigError(f"model.new.cvt: unknown field {', '.join(unknown)}")
        try:
            fields, preprocessing = {**new.cvt, **label_fields(new.labels)}, new.preprocessor
            if new.preset is None:
                architecture = CvtConfig(**fields)
            else:
                architecture = preset_config(new.preset, **fields)
                preprocessing = {**Preprocessor.published().to_dict(), **preprocessing}
            preprocessor = Preprocessor.from_dict(preprocessing, "model.new.preprocessor")
        except ValueError as error:
            raise ConfigError(f"model.new: {error}") from None
        made = TrainingModel(CvtForImageClassification(architecture), preprocessor)
    else:
        made = _load_model(config)
    if problem := transformers_problem(made.model.config):
        logger.warning("%s; cvt-label can load and use this model", problem)
    return made


def _load_model(config: TrainConfig) -> TrainingModel:
    assert config.model.pretrained is not None  # the configuration has either `new` or `pretrained`
    checkpoint = open_checkpoint(make_storage(config.storage), config.model.pretrained, config.model.revision)
    model, labels = checkpoint.to_transformers(), config.model.labels
    model.config.problem_type = None  # the loss is that of one class per image
    if labels is not None and tuple(labels) != checkpoint.labels:
        model.config.update(label_fields(labels))
        model.num_labels = len(labels)
        model.classifier = nn.Linear(checkpoint.embedding_width, len(labels))
        nn.init.trunc_normal_(model.classifier.weight, std=model.config.initializer_range)
        nn.init.zeros_(model.classifier.bias)
    return TrainingModel(model, checkpoint.preprocessor, checkpoint.digest)
