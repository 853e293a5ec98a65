"""Tests of the model of a training: what is reported about it before the training starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cvt.checkpoints import BUNDLED
from pipeline.config import ConfigError, TrainConfig, load_config
from pipeline.train.preparation import make_training_model
from tests.cvt.random_models import shallow

LABELS = "model.new.labels=[cat, dog]"


def config(*overrides: str) -> TrainConfig:
    paths = ["train.uri=/train", "validation.uri=/validation", "output.uri=/out"]
    return load_config(TrainConfig, None, [*paths, *overrides])


@pytest.mark.parametrize(("depth", "warned"), [("[1, 1, 2]", True), ("[1, 2, 3]", False)])
def test_new_model_that_transformers_cannot_load_is_reported(
    caplog: pytest.LogCaptureFixture, depth: str, warned: bool
) -> None:
    widths = ["model.new.cvt.embed_dim=[8, 16, 16]", "model.new.cvt.num_heads=[1, 1, 1]"]
    make_training_model(config(LABELS, *widths, f"model.new.cvt.depth={depth}"))
    message = "transformers cannot load this model: its CvT needs depth[1] > 1, not 1"
    assert caplog.messages == ([f"{message}; cvt-label can load and use it"] if warned else [])


def test_fine_tuned_model_that_transformers_cannot_load_is_reported(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    shallow(tmp_path / "shallow")
    make_training_model(config(f"model.pretrained={tmp_path / 'shallow'}"))
    assert "transformers cannot load this model" in caplog.text


def test_fine_tuned_model_chooses_one_class(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(BUNDLED["fashion-mnist"], tmp_path / "clothes"))
    fields = json.loads((folder / "config.json").read_text()) | {"problem_type": "multi_label_classification"}
    (folder / "config.json").write_text(json.dumps(fields))
    assert make_training_model(config(f"model.pretrained={folder}")).model.config.problem_type is None


@pytest.mark.parametrize("field", ["model.new.labels", "model.labels"])
def test_training_needs_two_classes(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field}=\[cat\]: List should have at least 2 items"):
        config("model.pretrained=x" if field == "model.labels" else LABELS, f"{field}=[cat]")
