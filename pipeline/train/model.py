"""Training CvT on labelled shards with Ray Train: the data, the loop of a worker, the checkpoints.

It reads shards by the same readers and preprocessing as labelling does, and writes checkpoints in the
format that labelling loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cvt.checkpoints import save_checkpoint
from cvt.configuration import CvtConfig
from cvt.modeling import CvtForImageClassification
from cvt.preprocessing import Preprocessor
from cvt.presets import preset_config, preset_preprocessor
from pipeline.classify.checkpoint import open_checkpoint
from pipeline.config import ConfigError, TrainConfig, make_storage


@dataclass(frozen=True)
class Subject:
    """What is trained: a model, and the preprocessing that goes with it."""

    model: CvtForImageClassification
    preprocessor: Preprocessor


def make_subject(config: TrainConfig) -> Subject:
    """Makes the new model that the configuration describes, or loads the one that it starts from.

    Raises:
        CheckpointError: the checkpoint can't be loaded.
        ConfigError: the architecture or its preprocessing can't be.
    """
    torch.manual_seed(config.schedule.seed)
    if (new := config.model.new) is not None:
        unknown = sorted(new.cvt.keys() - CvtConfig.__annotations__.keys())
        if unknown:
            raise ConfigError(f"model.new.cvt: unknown field {', '.join(unknown)}")
        try:
            fields, preprocessing = {**new.cvt, **_label_fields(new.labels)}, new.preprocessor
            if new.preset is None:
                architecture = CvtConfig(**fields)
            else:
                architecture = preset_config(new.preset, **fields)
                preprocessing = {**preset_preprocessor().to_dict(), **preprocessing}
            preprocessor = Preprocessor.from_dict(preprocessing, "model.new.preprocessor")
        except ValueError as error:
            raise ConfigError(f"model.new: {error}") from None
        return Subject(CvtForImageClassification(architecture), preprocessor)
    assert config.model.start is not None  # the configuration has the one or the other
    checkpoint = open_checkpoint(make_storage(config.storage), config.model.start, config.model.revision)
    model, labels = checkpoint.model, config.model.labels
    if labels is not None and tuple(labels) != checkpoint.labels:
        model.config.update(_label_fields(labels))
        model.num_labels = len(labels)
        model.classifier = nn.Linear(checkpoint.embedding_width, len(labels))
        nn.init.trunc_normal_(model.classifier.weight, std=model.config.initializer_range)
        nn.init.zeros_(model.classifier.bias)
    return Subject(model, checkpoint.preprocessor)


def _label_fields(labels: list[str]) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }


def save_model(subject: Subject, folder: Path) -> None:
    """Writes a model and its preprocessing as labelling, and transformers, load them."""
    save_checkpoint(subject.model, subject.preprocessor, folder)
