"""Tests of the model of a training: what is reported about it before the training starts."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from cvt.checkpoints import BUNDLED
from cvt.errors import CheckpointError
from pipeline.config import ConfigError, TrainConfig, load_config
from pipeline.storage import StorageError
from pipeline.train.preparation import make_training_model, prepare_training, write_output
from tests.cvt.random_models import shallow
from tests.makers import make_tar

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
    assert caplog.messages == ([f"{message}; cvt-label can load and use this model"] if warned else [])


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
    with pytest.raises(ConfigError, match=rf"{field}=\[cat\]: must have at least 2 items"):
        config("model.pretrained=x" if field == "model.labels" else LABELS, f"{field}=[cat]")


def prepared_config(folder: Path) -> TrainConfig:
    """A training of the bundled model on one shard without samples."""
    (folder / "shard.tar").write_bytes(make_tar([]))
    paths = [f"{name}.uri={folder}" for name in ("train", "validation")]
    return config("model.pretrained=fashion-mnist", *paths, f"output.uri={folder}/out")


def bytes_of(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"settings": {}}, protocol=2),
        b"\x80\x02U\x01",
        b"\x80\x02X\x01\0\0\0\xffq\0.",
        bytes_of({"model": {}}),
        bytes_of([1]),
        bytes_of({"settings": {}}),
        bytes_of({"settings": 1, "epoch": 1, "best": None}),
    ],
    ids=["pickle", "opcode", "text", "weights", "list", "no epoch", "settings"],
)
def test_file_of_another_program_is_not_the_state(tmp_path: Path, content: bytes) -> None:
    settings = prepared_config(tmp_path)
    Path(settings.folder).mkdir(parents=True)
    Path(settings.state_uri).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.pt: not the state of a training: "):
        prepare_training(settings)


def test_only_one_of_two_trainings_writes_the_output(tmp_path: Path) -> None:
    settings = prepared_config(tmp_path)
    first, second = prepare_training(settings), prepare_training(settings)

    def state(epoch: int) -> bytes:
        return bytes_of({"settings": dict(first.settings), "epoch": epoch, "best": None})

    weights, conflict = f"{settings.model_uri}/model.safetensors", r"state\.pt: another training writes to"
    version = write_output(first, first.version, settings.state_uri, state(0))
    assert write_output(first, first.version, settings.state_uri, state(0)) == version  # a lost response
    assert write_output(first, version, weights, b"first") == version
    for uri in (settings.state_uri, weights):
        with pytest.raises(StorageError, match=conflict):
            write_output(second, second.version, uri, state(1))
    assert Path(weights).read_bytes() == b"first"
    resumed = prepare_training(settings)
    assert resumed.state is not None
    assert resumed.state["epoch"] == 0
    write_output(resumed, resumed.version, settings.state_uri, state(2))
    with pytest.raises(StorageError, match=conflict):
        write_output(first, version, settings.state_uri, state(1))
