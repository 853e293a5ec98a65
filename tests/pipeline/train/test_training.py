"""Training on real shards with Ray Train: new models, resumed training, and fine-tuning."""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from cvt.checkpoints import BUNDLED, load_checkpoint
from cvt.errors import CheckpointError
from cvt.presets import preset_preprocessor
from jobs.train import train as train_command
from pipeline.config import ConfigError, TrainConfig, load_config
from pipeline.train.preparation import make_training_model
from pipeline.train.training import _Trainer, augment, train
from tests.makers import make_tar

SAMPLE = Path(__file__).parents[3] / "jobs" / "data" / "fashion-mnist"
FASHION_MNIST = Path(__file__).parents[3] / "configs" / "fashion_mnist_train.yaml"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training shards and one validation shard with 96 images each, and a few unusable samples."""
    folder = tmp_path_factory.mktemp("shards")
    with tarfile.open(SAMPLE / "test-0000.tar") as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()[: 3 * 192]]  # type: ignore[union-attr]
    for name, start in (("train/0.tar", 0), ("train/1.tar", 192), ("validation/0.tar", 384)):
        (folder / name).parent.mkdir(exist_ok=True)
        content = [*members[start : start + 192], ("broken.jpg", b"no image"), ("broken.cls", b"1")]
        (folder / name).write_bytes(make_tar([*content, ("nolabel.png", members[0][1])]))
    return folder


def config(shards: Path, output: Path, *overrides: str) -> TrainConfig:
    return load_config(
        TrainConfig,
        FASHION_MNIST,
        [
            f"train.uri={shards}/train",
            f"validation.uri={shards}/validation",
            f"output.uri={output}",
            "model.new.cvt.embed_dim=[8, 16, 16]",
            "model.new.cvt.num_heads=[1, 2, 2]",
            "model.new.cvt.depth=[1, 1, 1]",
            "optimization.batch_size=32",
            "optimization.epochs=2",
            "workers.threads=1",
            *overrides,
        ],
    )


def test_interrupted_training_resumes_after_the_last_epoch(
    ray_local: None, shards: Path, tmp_path: Path
) -> None:
    seen: list[Mapping[str, float]] = []
    train(config(shards, tmp_path, "optimization.epochs=1"), seen.append)
    assert [row["epoch"] for row in seen] == [1]
    resumed = train(config(shards, tmp_path), seen.append)
    assert [row["epoch"] for row in seen] == [1, 2]
    assert resumed.best["accuracy"] == max(row["accuracy"] for row in seen)
    assert all(0 <= row["accuracy"] <= 1 for row in seen)

    checkpoint = load_checkpoint(resumed.path)
    assert checkpoint.labels == load_checkpoint("fashion-mnist").labels
    assert checkpoint.preprocessor == load_checkpoint("fashion-mnist").preprocessor
    assert sorted(p.name for p in Path(resumed.path).iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_training_resumes_with_the_same_optimizer_settings_only(shards: Path, tmp_path: Path) -> None:
    def trainer(*overrides: str) -> _Trainer:
        settings = config(shards, tmp_path, *overrides)
        return _Trainer(make_training_model(settings), settings.optimization, 4, torch.device("cpu"))

    trainer().save(tmp_path, finished_epochs=1)
    assert trainer("optimization.epochs=7").load(tmp_path) == 1
    with pytest.raises(ValueError, match=r"started with .*'batch_size': 32"):
        trainer("optimization.batch_size=16").load(tmp_path)


def test_unreadable_shard_fails_the_training_and_is_named(
    ray_local: None, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "train").mkdir()
    complete = (shards / "train" / "0.tar").read_bytes()
    (tmp_path / "train" / "truncated.tar").write_bytes(complete[: len(complete) // 2])
    with pytest.raises(Exception, match=r"truncated\.tar"):
        train(config(shards, tmp_path / "runs", f"train.uri={tmp_path}/train"), lambda _: None)


def test_fine_tuning_replaces_the_classifier_for_other_labels(shards: Path, tmp_path: Path) -> None:
    start = ["model.new=null", "model.pretrained=fashion-mnist"]
    same = make_training_model(config(shards, tmp_path, *start))
    assert same.model.config.num_labels == 10
    other = make_training_model(config(shards, tmp_path, *start, "model.labels=[dress, shoe]"))
    assert other.model.config.id2label == {0: "dress", 1: "shoe"}
    assert other.model(torch.zeros(1, 3, 28, 28)).logits.shape == (1, 2)
    torch.testing.assert_close(other.model.cvt.state_dict(), same.model.cvt.state_dict())


def test_checkpoint_that_cannot_be_loaded_is_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="/no/such/model"):
        make_training_model(config(shards, tmp_path, "model.new=null", "model.pretrained=/no/such/model"))


def test_new_model_and_pretrained_model_are_exclusive(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"either model\.new or model\.pretrained"):
        config(shards, tmp_path, "model.pretrained=fashion-mnist")


def test_unknown_architecture_field_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.new\.cvt: unknown field depht"):
        make_training_model(config(shards, tmp_path, "model.new.cvt.depht=[1, 1, 1]"))
    with pytest.raises(ConfigError, match=r"model\.new: .*num_heads"):
        make_training_model(config(shards, tmp_path, "model.new.cvt.num_heads=[1, 2, 3]"))


def test_new_model_can_use_a_preset(shards: Path, tmp_path: Path) -> None:
    plain = ["model.new.cvt={}", "model.new.preprocessor={}", "model.new.preset=cvt-21"]
    made = make_training_model(config(shards, tmp_path, *plain, "model.new.cvt.depth=[1, 1, 2]"))
    assert made.model.config.embed_dim == [64, 192, 384]
    assert made.model.config.depth == [1, 1, 2]
    assert made.model.config.num_labels == 10
    assert made.preprocessor == preset_preprocessor(224)
    with pytest.raises(ConfigError, match=r"model\.new: unknown preset 'cvt-14'; choose one of cvt-13"):
        make_training_model(config(shards, tmp_path, "model.new.preset=cvt-14"))


def test_bundled_checkpoint_has_the_configured_architecture() -> None:
    made = make_training_model(load_config(TrainConfig, FASHION_MNIST))
    bundled = load_checkpoint(str(BUNDLED["fashion-mnist"]))
    assert made.preprocessor == bundled.preprocessor
    assert {k: v.shape for k, v in made.model.state_dict().items()} == {
        k: v.shape for k, v in bundled.model.state_dict().items()
    }


def test_training_without_ray_train_names_the_extra(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray.train", None)
    monkeypatch.delattr("pipeline.train.training")
    monkeypatch.delitem(sys.modules, "pipeline.train.training")
    monkeypatch.setattr("pipeline.train.ray_cluster", lambda address: nullcontext())
    app = typer.Typer()
    app.command()(train_command)
    done = CliRunner().invoke(app, ["--config", str(FASHION_MNIST)])
    assert done.exit_code == 2
    assert "pip install 'cvt-label[train]'" in done.output


def test_augmentation_shifts_and_flips_whole_images() -> None:
    torch.manual_seed(0)
    image = torch.arange(1, 37, dtype=torch.uint8).reshape(1, 1, 6, 6).expand(64, 3, 6, 6)
    made = augment(image, flip=True, shift=1)
    assert made.shape == image.shape
    padded = torch.nn.functional.pad(image[:1], (1, 1, 1, 1))
    windows = [padded[0, :, y : y + 6, x : x + 6] for y in range(3) for x in range(3)]
    windows += [window.flip(-1) for window in windows]
    possible = {window.contiguous().numpy().tobytes() for window in windows}
    found = {one.contiguous().numpy().tobytes() for one in made}
    assert found <= possible
    assert len(found) > 9  # both shifts and flips occur


def test_images_do_not_change_without_augmentation() -> None:
    image = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    assert torch.equal(augment(image, flip=False, shift=0), image)
