"""The model of a training: a new model, or a checkpoint to fine-tune. Needs no Ray."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from cvt.architecture import FIELDS
from cvt.checkpoints.checkpoint import label_fields
from cvt.configuration import CvtConfig
from cvt.modeling import CvtForImageClassification
from cvt.preprocessing import Preprocessor
from cvt.presets import preset_config, preset_preprocessor
from pipeline.classify.checkpoint import open_checkpoint
from pipeline.config import ConfigError, TrainConfig, make_storage


class TrainingModel(NamedTuple):
    """A model and its preprocessor."""

    model: CvtForImageClassification
    preprocessor: Preprocessor


def make_training_model(config: TrainConfig) -> TrainingModel:
    """Creates the configured new model, or loads the configured checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ConfigError: the architecture or the preprocessing is not valid.
    """
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
                preprocessing = {**preset_preprocessor().to_dict(), **preprocessing}
            preprocessor = Preprocessor.from_dict(preprocessing, "model.new.preprocessor")
        except ValueError as error:
            raise ConfigError(f"model.new: {error}") from None
        return TrainingModel(CvtForImageClassification(architecture), preprocessor)
    assert config.model.pretrained is not None  # the configuration has either `new` or `pretrained`
    checkpoint = open_checkpoint(make_storage(config.storage), config.model.pretrained, config.model.revision)
    model, labels = checkpoint.to_transformers(), config.model.labels
    if labels is not None and tuple(labels) != checkpoint.labels:
        model.config.update(label_fields(labels))
        model.num_labels = len(labels)
        model.classifier = nn.Linear(checkpoint.embedding_width, len(labels))
        nn.init.trunc_normal_(model.classifier.weight, std=model.config.initializer_range)
        nn.init.zeros_(model.classifier.bias)
    return TrainingModel(model, checkpoint.preprocessor)
