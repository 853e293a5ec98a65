"""Checkpoints in a bucket: which objects are read, and how errors name them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cvt.checkpoints import BUNDLED, load_checkpoint
from cvt.errors import CheckpointError
from cvt.modeling import CvtForImageClassification, preset_config
from pipeline.classify.checkpoint import open_checkpoint
from pipeline.config import Config, load_config
from pipeline.run import make_job
from pipeline.storage import ObjectNotFound, Storage
from tests.cvt.microsoft_names import as_microsoft

FOLDER = BUNDLED["fashion-mnist"]


class RecordingStorage(Storage):
    """Storage that records the opened objects."""

    opened: set[str]

    def open(self, uri: str, version: str | None = None):  # type: ignore[no-untyped-def]
        assert version is not None  # never read bytes of two versions
        self.opened.add(uri)
        return super().open(uri, version)


@pytest.fixture
def recording(storage: Storage) -> RecordingStorage:
    made = RecordingStorage(storage.endpoint_url)
    object.__setattr__(made, "opened", set())
    return made


def put(storage: Storage, folder: Path, uri: str) -> None:
    for file in folder.iterdir():
        storage.write(f"{uri}/{file.name}", file.read_bytes())


def checkpoint_error(storage: Storage, path: str, labels: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(storage, path, labels=labels)
    return str(caught.value)


@pytest.fixture(autouse=True)
def temporary_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    yield
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("slash", ["", "/"])
def test_folder_in_a_bucket_loads_and_gives_the_name(
    bucket: str, recording: RecordingStorage, slash: str
) -> None:
    uri = f"{bucket}/models/my clothes"
    put(recording, FOLDER, uri)
    for name in ("tf_model.h5", "pytorch_model.bin", "optimizer.pt", "logs/model.safetensors"):
        recording.write(f"{uri}/{name}", b"unused")
    checkpoint = open_checkpoint(recording, uri + slash)
    assert checkpoint.name == "my-clothes"
    assert checkpoint.digest == load_checkpoint("fashion-mnist").digest
    names = {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert recording.opened == {f"{uri}/{name}" for name in names}


def test_objects_are_read_once_per_version(bucket: str, recording: RecordingStorage) -> None:
    uri, labels = f"{bucket}/clothes", f"{bucket}/labels.txt"
    put(recording, FOLDER, uri)
    recording.write(labels, "\n".join("abcdefghij").encode())
    digests = {open_checkpoint(recording, uri, labels=labels).digest}
    for name in ("config.json", "model.safetensors", "../labels.txt"):
        changed = f"{uri}/{name}" if name != "../labels.txt" else labels
        recording.opened.clear()
        cached = open_checkpoint(recording, uri, labels=labels)
        assert cached.digest in digests
        assert recording.opened == set()
        content = recording.read(changed)
        recording.write(changed, content[:-1] + b"x" if changed == labels else content + b" ")
        if name == "model.safetensors":  # damages the file
            assert f"{changed}: " in checkpoint_error(recording, uri, labels)
            recording.write(changed, content)
        else:
            digests.add(open_checkpoint(recording, uri, labels=labels).digest)
            assert changed in recording.opened
    assert len(digests) == 2  # a space in config.json changes nothing


def test_sharded_weights_in_a_bucket_load(bucket: str, storage: Storage, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "clothes"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = len(weights) // 2
    parts = {
        "pytorch_model-1-of-2.bin": list(weights)[:half],
        "pytorch_model-2-of-2.bin": list(weights)[half:],
    }
    for name, keys in parts.items():
        torch.save({key: weights[key] for key in keys}, folder / name)
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    put(storage, folder, f"{bucket}/clothes")
    assert open_checkpoint(storage, f"{bucket}/clothes").digest == load_checkpoint("fashion-mnist").digest
    storage.delete(f"{bucket}/clothes/pytorch_model-2-of-2.bin")
    assert f"{bucket}/clothes/pytorch_model-2-of-2.bin: " in checkpoint_error(storage, f"{bucket}/clothes")


@pytest.mark.slow
def test_microsoft_checkpoint_in_a_bucket_loads(bucket: str, storage: Storage, tmp_path: Path) -> None:
    config = preset_config("cvt-13", num_labels=3)
    with torch.device("meta"):
        model = CvtForImageClassification(config)
    weights = {key: torch.ones(tensor.shape) for key, tensor in model.state_dict().items()}
    local = tmp_path / "CvT-13-384x384-mine.pth"
    torch.save(as_microsoft(weights, config.depth), local)
    with local.open("rb") as file:
        storage.write(f"{bucket}/{local.name}", file)
    checkpoint = open_checkpoint(storage, f"{bucket}/{local.name}")
    assert checkpoint.name == "CvT-13-384x384-mine"
    assert checkpoint.preprocessor.size == 384
    assert checkpoint.digest == load_checkpoint(str(local)).digest


def test_missing_checkpoint_is_named(bucket: str, storage: Storage) -> None:
    assert f"model '{bucket}/none': no such folder" in checkpoint_error(storage, f"{bucket}/none")
    for name in ("none.pth", "none/tf_model.h5"):
        with pytest.raises(ObjectNotFound, match=f"{bucket}/{name}: no such object"):
            open_checkpoint(storage, f"{bucket}/{name}")
    with pytest.raises(ObjectNotFound, match=f"{bucket}/labels.txt"):
        open_checkpoint(storage, "fashion-mnist", labels=f"{bucket}/labels.txt")


def test_invalid_object_is_reported_by_its_uri(bucket: str, storage: Storage) -> None:
    uri = f"{bucket}/clothes"
    put(storage, FOLDER, uri)
    storage.write(f"{uri}/model.safetensors", b"no weights")
    assert f"model '{uri}': {uri}/model.safetensors: " in checkpoint_error(storage, uri)
    storage.delete(f"{uri}/preprocessor_config.json")
    storage.write(f"{uri}/model.safetensors", (FOLDER / "model.safetensors").read_bytes())
    assert (
        f"model '{uri}': {uri}/preprocessor_config.json: cannot be read as JSON: No such"
        in checkpoint_error(storage, uri)
    )
    storage.delete(f"{uri}/config.json")
    assert f"model '{uri}': the folder has no config.json" in checkpoint_error(storage, uri)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_large_object_is_not_copied(bucket: str, recording: RecordingStorage, name: str) -> None:
    put(recording, FOLDER, f"{bucket}/clothes")
    recording.write(f"{bucket}/clothes/{name}", b" " * (8 * 1024**2 + 1))
    message = checkpoint_error(recording, f"{bucket}/clothes")
    assert f"{bucket}/clothes/{name}: has 8,388,609 bytes, more than 8,388,608" in message
    assert f"{bucket}/clothes/{name}" not in recording.opened


def test_multi_label_model_is_not_labeled(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "clothes"))
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"problem_type": "multi_label_classification"}))
    with pytest.raises(CheckpointError, match="problem_type is 'multi_label_classification'"):
        make_job(config(str(tmp_path / "out"), path=str(folder)))


def test_full_disk_is_a_checkpoint_error(
    bucket: str, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(storage, FOLDER, f"{bucket}/clothes")
    (tmp_path / "full").mkdir()
    monkeypatch.setattr("shutil.copyfileobj", lambda *_: Path("/dev/full").write_bytes(b"x"))
    assert "cannot copy to" in checkpoint_error(storage, f"{bucket}/clothes")


def test_tensorflow_checkpoint_in_a_bucket_loads_with_its_configuration(
    bucket: str, recording: RecordingStorage
) -> None:
    put(recording, FOLDER, f"{bucket}/clothes")
    recording.write(f"{bucket}/clothes/tf_model.h5", b"no weights")
    assert f"{bucket}/clothes/tf_model.h5: " in checkpoint_error(recording, f"{bucket}/clothes/tf_model.h5")
    names = {"config.json", "preprocessor_config.json", "tf_model.h5"}
    assert recording.opened == {f"{bucket}/clothes/{name}" for name in names}


def config(output: str, **model: str) -> Config:
    overrides = [f"model.{field}={value}" for field, value in model.items()]
    return load_config(Config, None, ["input.uri=/in", f"output.uri={output}", *overrides])


def test_class_names_from_a_bucket_change_the_partition(
    bucket: str, storage: Storage, tmp_path: Path
) -> None:
    names = [f"label {i}" for i in range(10)]
    storage.write(f"{bucket}/labels.txt", "\n".join(names).encode())
    (tmp_path / "labels.json").write_text(json.dumps(names))
    own = make_job(config(bucket, path="fashion-mnist"))
    remote = make_job(config(bucket, path="fashion-mnist", labels=f"{bucket}/labels.txt"))
    local = make_job(config(bucket, path="fashion-mnist", labels=str(tmp_path / "labels.json")))
    assert remote.checkpoint.labels == tuple(names)
    assert remote.fingerprint == local.fingerprint != own.fingerprint
    assert remote.partition.uri != own.partition.uri
    storage.write(f"{bucket}/labels.txt", b"a\nb\n")
    message = checkpoint_error(storage, "fashion-mnist", f"{bucket}/labels.txt")
    assert "labels.txt: number of names: 2, number of classes of the model: 10" in message


def test_partition_does_not_depend_on_the_location_of_the_model(bucket: str, storage: Storage) -> None:
    put(storage, FOLDER, f"{bucket}/models/fashion-mnist")
    remote = make_job(config(bucket, path=f"{bucket}/models/fashion-mnist"))
    assert remote.partition.uri == make_job(config(bucket, path="fashion-mnist")).partition.uri
