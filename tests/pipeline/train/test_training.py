"""Training on real shards with Ray Train: new models, resumed training, and fine-tuning."""

from __future__ import annotations

import io
import logging
import os
import re
import runpy
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from ray.util.queue import Queue

from cvt.checkpoints import BUNDLED, load_checkpoint
from cvt.errors import CheckpointError
from cvt.preprocessing import Preprocessor
from jobs.train import describe_progress
from jobs.train import train as train_command
from pipeline import open_partition
from pipeline.classify.checkpoint import open_checkpoint
from pipeline.config import ConfigError, TrainConfig, load_config
from pipeline.dataflow.ray_executor import count_attempts
from pipeline.dataflow.training_images import TrainingImages
from pipeline.decode import DecodeOptions
from pipeline.read import ReadOptions, list_input_shards
from pipeline.storage import Storage, StorageError
from pipeline.train import train_model
from pipeline.train.preparation import TrainResult, make_training_model, prepare_training
from pipeline.train.training import _Trainer, augment, train
from tests.command import invoke
from tests.makers import make_parquet, make_tar

SAMPLE = Path(__file__).parents[3] / "jobs" / "data" / "fashion-mnist"
EXAMPLE = Path(__file__).parents[3] / "examples" / "fine_tune_then_label.py"
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


def config(shards: Path, output: Path | str, *overrides: str) -> TrainConfig:
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
            "workers.count=0",
            *overrides,
        ],
    )


def run(config: TrainConfig, **options: Any) -> TrainResult:
    return train(prepare_training(config), progress_interval_s=0, **options)


def solid_png(color: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are faster with one thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray cannot start."""

    def refuse(address: str | None) -> NoReturn:
        raise AssertionError("Ray starts")

    monkeypatch.setattr("pipeline.train.ray_cluster", refuse)


class Trained(NamedTuple):
    result: TrainResult
    epochs: list[Mapping[str, float]]
    progress: list[Mapping[str, float]]
    log: list[str]
    output: Path


@pytest.fixture(scope="module")
def trained(ray_local: None, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A training of two epochs with six steps each, which was not interrupted."""
    output, log = tmp_path_factory.mktemp("trained"), logging.getLogger("cvt_label")
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    epochs: list[Mapping[str, float]] = []
    progress: list[Mapping[str, float]] = []
    result = run(config(shards, output), on_epoch=epochs.append, on_progress=progress.append)
    log.removeHandler(handler)
    return Trained(result, epochs, progress, messages, output)


def test_best_model_is_saved_in_the_format_that_labeling_loads(trained: Trained) -> None:
    checkpoint = load_checkpoint(trained.result.path)
    assert checkpoint.labels == load_checkpoint("fashion-mnist").labels
    assert checkpoint.preprocessor == load_checkpoint("fashion-mnist").preprocessor
    assert trained.result.best["accuracy"] == max(row["accuracy"] for row in trained.epochs)
    assert all(0 <= row["accuracy"] <= 1 for row in trained.epochs)
    # The weights last: they alone differ between epochs.
    files = sorted(Path(trained.result.path).iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert {file.name for file in files[:2]} == {"config.json", "preprocessor_config.json"}
    assert [file.name for file in files[2:]] == ["model.safetensors"]
    assert not list(trained.output.glob("**/*checkpoint*"))  # nothing of Ray Train


def test_progress_has_step_and_loss(trained: Trained) -> None:
    assert [(row["epoch"], row["step"]) for row in trained.progress] == [
        (epoch, step) for epoch in (1, 2) for step in range(1, 7)
    ]
    assert {row["steps"] for row in trained.progress} == {6}
    assert trained.progress[5]["train_loss"] == pytest.approx(trained.epochs[0]["train_loss"])


def test_skipped_images_are_counted_by_reason(trained: Trained) -> None:
    assert "train: 196 images, 4 skipped, unsupported format: 2, no target: 2" in trained.log
    assert "validation: 98 images, 2 skipped, unsupported format: 1, no target: 1" in trained.log


def test_training_interrupted_within_an_epoch_continues_exactly(
    trained: Trained, shards: Path, bucket: str
) -> None:
    settings = config(shards, bucket, "output.checkpoint_interval_s=1e-6")

    def interrupt(epoch: int, step: int) -> Callable[[Mapping[str, float]], None]:
        def on_progress(progress: Mapping[str, float]) -> None:
            steps.append((progress["epoch"], progress["step"]))
            if steps[-1] == (epoch, step):
                raise KeyboardInterrupt

        return on_progress

    steps: list[tuple[float, float]] = []
    with pytest.raises(KeyboardInterrupt):
        run(settings, on_progress=interrupt(2, 2))
    # The model of the first epoch is complete, although the training is not.
    assert open_checkpoint(Storage(), settings.model_uri).labels
    finished, steps = steps[-1], []
    result = run(settings, on_progress=interrupt(0, 0))
    assert finished < steps[0] <= (2, 4)  # the state of step 2 or, if its worker was faster, of step 3
    uninterrupted, resumed = (
        prepare_training(each).state for each in (config(shards, trained.output), settings)
    )
    assert uninterrupted is not None
    assert resumed is not None
    torch.testing.assert_close(resumed["model"], uninterrupted["model"], rtol=0, atol=0)
    expected = {name: trained.result.best[name] for name in ("epoch", "accuracy", "loss")}
    assert {name: result.best[name] for name in expected} == expected


@pytest.mark.usefixtures("no_ray")
def test_finished_training_ends_at_once(trained: Trained, shards: Path) -> None:
    assert train_model(config(shards, trained.output)) == trained.result


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("model.new.cvt.depth=[1, 2, 1]", "model.depth was [1, 1, 1], and is now [1, 2, 1]"),
        ("model.new.preprocessor.crop_pct=0.5", "preprocessor.crop_pct was 1.0, and is now 0.5"),
        ("optimization.batch_size=16", "count * optimization.batch_size was 32, and is now 16"),
        ("optimization.seed=1", "optimization.seed was 0, and is now 1"),
        ("train.uri={shards}/validation", 'train.shards was "2 with digest'),
    ],
)
def test_other_training_in_the_same_output_is_refused(
    trained: Trained, shards: Path, override: str, difference: str
) -> None:
    other = config(shards, trained.output, "optimization.epochs=3", override.format(shards=shards))
    with pytest.raises(ConfigError, match=re.escape(difference)) as refused:
        train_model(other)
    assert f"cannot resume the training in {trained.output}/fashion-mnist" in str(refused.value)
    assert "set another output.name" in str(refused.value)


@pytest.mark.usefixtures("no_ray")
def test_changed_shard_is_another_dataset(trained: Trained, shards: Path, tmp_path: Path) -> None:
    content = (shards / "train" / "1.tar").read_bytes()
    original = (shards / "train" / "1.tar").stat()
    (shards / "train" / "1.tar").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r'train\.shards was "2 with digest \w+", and is now "2 with digest \w+"'
    ):
        train_model(config(shards, trained.output))
    os.utime(shards / "train" / "1.tar", ns=(original.st_atime_ns, original.st_mtime_ns))


@pytest.mark.usefixtures("no_ray")
def test_output_with_a_model_but_no_state_is_refused(trained: Trained, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(trained.result.path, tmp_path / "fashion-mnist" / "model")
    with pytest.raises(ConfigError, match="the state is missing"):
        train_model(config(shards, tmp_path))


@pytest.mark.usefixtures("no_ray")
def test_damaged_state_is_named(trained: Trained, shards: Path, tmp_path: Path) -> None:
    settings = config(shards, tmp_path)
    (tmp_path / "fashion-mnist").mkdir()
    state = Path(config(shards, trained.output).state_uri).read_bytes()
    for content in (b"", b"no state", state[: len(state) // 2]):
        Path(settings.state_uri).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"state\.pt: not the state of a training"):
            train_model(settings)


@pytest.mark.usefixtures("no_ray")
def test_command_refuses_another_training_with_status_2(trained: Trained, shards: Path) -> None:
    settings = config(shards, trained.output, "optimization.seed=1")
    file = trained.output / "train.yaml"
    file.write_text(settings.model_dump_json())
    output = invoke(train_command, "--config", file, status=2).output
    assert "optimization.seed was 0, and is now 1" in output
    finished = invoke(train_command, "--config", file, "--set", "optimization.seed=0").output
    assert finished.startswith(f"best: epoch {trained.result.best['epoch']}, accuracy ")


@pytest.mark.parametrize(
    ("cache", "block_images"), [(True, 10), pytest.param(False, 100, marks=pytest.mark.long)]
)
def test_seed_and_epoch_determine_a_mixed_order_of_all_images(
    ray_local: None, tmp_path: Path, cache: bool, block_images: int
) -> None:
    """Each of ten shards has 50 images of one class; the color of an image is its number."""
    for shard in range(10):
        colors = [(number % 256, number // 256, 0) for number in range(shard * 50, shard * 50 + 50)]
        columns = {"image": [solid_png(color) for color in colors], "label": [shard] * 50}
        (tmp_path / f"{shard}.parquet").write_bytes(make_parquet(columns))
    settings = config(
        tmp_path,
        tmp_path,
        f"train.uri={tmp_path}",
        "train.label_column=label",
        "model.new.preprocessor.image_mean=[0, 0, 0]",
        "model.new.preprocessor.image_std=[1, 1, 1]",
        "model.new.preprocessor.size.shortest_edge=16",
        "optimization.batch_size=25",
        "optimization.shuffle_buffer=100",
    )
    model = make_training_model(settings)
    shards = list_input_shards(Storage(), settings.train, "train.uri")
    options = ReadOptions(settings.train, class_names=[*model.model.config.id2label.values()])
    queue, attempts = Queue(actor_options={"num_cpus": 0}), count_attempts(1)
    images = TrainingImages(
        shards, Storage(), options, DecodeOptions(model.preprocessor, 1000), attempts, queue, block_images
    )
    assert images.load(cache) == []
    assert (images.usable, images.skipped.total()) == (500, 0)

    def numbers(epoch: int, step: int = 0) -> np.ndarray:
        trainer = _Trainer(model, settings.optimization, 20, torch.device("cpu"))
        trainer.epoch, trainer.step = epoch, step
        batches = trainer.batches(images.dataset(f"0:{epoch}"))
        colors = torch.cat([(pixels[:, :, 8, 8] * 255).round().long() for pixels, _ in batches])
        return (colors @ torch.tensor([1, 256, 0])).numpy()

    first, second = numbers(0), numbers(1)
    assert sorted(first) == sorted(second) == list(range(500))
    assert (first != second).mean() > 0.9
    assert np.array_equal(numbers(0, step=7), first[7 * 25 :])  # as a resumed training reads them
    classes = [np.bincount(batch // 50, minlength=10) for batch in first.reshape(20, 25)]
    assert np.mean([np.count_nonzero(counts) for counts in classes]) > 5
    assert max(counts.max() for counts in classes) < 18


def test_two_workers_train_on_equal_parts(ray_local: None, shards: Path, tmp_path: Path) -> None:
    epochs: list[Mapping[str, float]] = []
    progress: list[Mapping[str, float]] = []
    settings = config(shards, tmp_path, "workers.count=2", "optimization.epochs=1")
    result = run(settings, on_epoch=epochs.append, on_progress=progress.append)
    assert [row["epoch"] for row in epochs] == [1]
    assert {row["steps"] for row in progress} == {3}
    assert result.best == epochs[0]
    assert load_checkpoint(result.path).labels


def test_training_without_usable_targets_ends_with_the_reasons(
    ray_local: None, shards: Path, tmp_path: Path
) -> None:
    reasons = "196 images, 151 skipped, target is no class: 147, unsupported format: 2, no target: 2"
    with pytest.raises(ConfigError, match=f"{reasons}; the limit is 50%"):
        run(config(shards, tmp_path, "model.new.labels=[cat,dog]"))


def test_folder_of_classes_trains_as_it_is(
    ray_local: None, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = load_checkpoint("fashion-mnist").labels
    for section in ("train", "validation"):
        with tarfile.open(shards / section / "0.tar") as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
        for name, content in members.items():
            if name.endswith(".png") and name != "nolabel.png":
                folder = labels[int(members[name.replace(".png", ".cls")])].replace("/", " or ")
                path = tmp_path / section / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        (tmp_path / section / "sheet.png").write_bytes(solid_png((0, 0, 0)))  # of no class
    mapping = '={"T-shirt or top": "T-shirt/top"}'
    (tmp_path / "map.json").write_text(mapping[1:])
    caplog.set_level(logging.INFO, "cvt_label")
    folders = ["train.label_from=folder", "validation.label_from=folder", f"train.target_map{mapping}"]
    settings = ["optimization.epochs=1", *folders, f"validation.target_map={tmp_path}/map.json"]
    result = run(config(tmp_path, tmp_path / "runs", *settings))
    assert load_checkpoint(result.path).labels == labels
    for section in ("train", "validation"):
        assert f"{section}: 97 images, 1 skipped, no target: 1" in caplog.messages


def test_unreadable_shards_fail_the_training_and_are_named(
    ray_local: None, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "train").mkdir()
    complete = (shards / "train" / "0.tar").read_bytes()
    for name in ("a.tar", "b.tar"):
        (tmp_path / "train" / name).write_bytes(complete[: len(complete) // 2])
    with pytest.raises(StorageError, match=r"2 shards cannot be read to the end: .*a\.tar.*b\.tar"):
        run(config(shards, tmp_path / "runs", f"train.uri={tmp_path}/train"))


def test_output_that_cannot_be_written_ends_the_training(
    ray_local: None, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StorageError, match="runs"):
        run(config(shards, tmp_path / "runs"))


def test_progress_is_described_with_images_and_completed_fraction(shards: Path, tmp_path: Path) -> None:
    settings = config(shards, tmp_path, "optimization.epochs=3")
    progress = {"epoch": 2, "step": 30, "steps": 120, "train_loss": 0.5}
    text, images, fraction = describe_progress(progress, settings)
    assert text == "epoch 2/3, step 30/120, train loss 0.5000"
    assert images == 150 * settings.images_per_step
    assert fraction == pytest.approx(150 / 360)


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
    assert made.preprocessor == Preprocessor.published(224)
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
    file = tmp_path / "train.yaml"
    file.write_text(config(shards, tmp_path).model_dump_json())
    done = invoke(train_command, "--config", file, status=2)
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


@pytest.mark.usefixtures("ray_local")
def test_example_labels_with_the_classes_that_it_trained(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = [f"class {i}" for i in range(10)]
    folders = [str(shards / name) for name in ("train", "validation", "validation")]
    options = ["--classes", *classes, "--epochs", "2", "--batch-size", "8"]
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *folders, str(tmp_path), *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == ["epoch 1", "epoch 2", "model"]
    assert lines[-1].startswith("labels of 98 images: ")
    assert open_partition(lines[-1].partition(": ")[2]).labels == classes
