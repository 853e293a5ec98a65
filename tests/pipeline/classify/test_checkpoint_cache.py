"""The cache of checkpoints: opening again reads no weights, and no outdated entry reaches a label."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cvt.checkpoints import BUNDLED, Checkpoint, load_checkpoint
from cvt.checkpoints.checkpoint import load_local
from cvt.checkpoints.microsoft import microsoft_key
from cvt.errors import CheckpointError
from cvt.modeling import CvtForImageClassification, preset_config
from pipeline.classify.checkpoint import open_checkpoint
from pipeline.storage import Storage

FOLDER, WEIGHTS = BUNDLED["fashion-mnist"], "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the entries, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cvt-label" / "checkpoints"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "clothes"))


def open_local(path: object, labels: object = None) -> Checkpoint:
    return open_checkpoint(Storage(), str(path), labels=labels and str(labels))


def known_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    fields = asdict(checkpoint) | {"load_model": None, "known_digest": checkpoint.digest}
    content: dict[str, Any] = json.loads(json.dumps(fields))
    return content


def is_cached(checkpoint: Checkpoint) -> bool:
    return checkpoint.known_digest is not None and "model" not in vars(checkpoint)


def change_weights(file: Path) -> None:
    """Writes other weights of the same size into the same file."""
    weights = load_file(file)
    weights["classifier.bias"] = weights["classifier.bias"] + 1
    save_file(weights, file)


# Layouts -----------------------------------------------------------------------------------------


def as_bundled(folder: Path) -> str:
    return "fashion-mnist"


def as_folder(folder: Path) -> Path:
    return folder


def as_sharded(folder: Path) -> Path:
    """Divides the weights into files whose names only the index has."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for i, name in enumerate(("a.bin", "b.bin")):
        torch.save(dict(list(weights.items())[i::2]), folder / name)
    files = {key: "ab"[i % 2] + ".bin" for i, key in enumerate(weights)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def as_tensorflow(folder: Path) -> Path:
    h5py = pytest.importorskip("h5py", reason="needs the extra `keras`")
    with h5py.File(folder / "tf_model.h5", "w") as file:
        for key, tensor in load_file(folder / WEIGHTS).items():
            if tensor.is_floating_point():
                module, _, leaf = key.rpartition(".")
                name = f"{key}:0" if leaf == "cls_token" else f"group/model/{module}/{leaf}:0"
                order = {2: (1, 0), 4: (2, 3, 1, 0)}.get(tensor.ndim, tuple(range(tensor.ndim)))
                file[name] = np.ascontiguousarray(tensor.numpy().transpose(order))
    (folder / WEIGHTS).unlink()
    return folder / "tf_model.h5"


def as_microsoft(folder: Path) -> Path:
    with torch.device("meta"):
        model = CvtForImageClassification(preset_config("cvt-13", num_labels=10))
    file = folder / "CvT-13-384x384-mine.pth"
    torch.save({microsoft_key(k): torch.ones(v.shape) for k, v in model.state_dict().items()}, file)
    return file


@pytest.mark.parametrize("labels", [None, "abcdefghij"])
@pytest.mark.parametrize("layout", [as_bundled, as_folder, as_sharded, as_tensorflow, as_microsoft])
def test_checkpoint_is_opened_again_without_its_weights(
    folder: Path, layout: Callable[[Path], object], labels: str | None
) -> None:
    path, names = layout(folder), None
    if labels is not None:
        names = folder / "names.txt"
        names.write_text("\n".join(labels))
    first, second = open_local(path, names), open_local(path, names)
    assert not is_cached(first)
    assert is_cached(second)
    loaded = load_checkpoint(str(path), labels=names and str(names))
    assert known_fields(first) == known_fields(second) == known_fields(loaded)
    assert (first.architecture, first.preprocessor) == (loaded.architecture, second.preprocessor)
    assert set(second.model.state_dict()) == set(loaded.model.state_dict())


def test_cached_hub_id_is_opened_again_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--clothes"
    (repository / "refs").mkdir(parents=True)
    for commit in ("0" * 40, "1" * 40):
        shutil.copytree(FOLDER, repository / "snapshots" / commit)
        (repository / "refs" / "main").write_text(commit)
        first, second = open_local("someone/clothes"), open_local("someone/clothes")
        assert (first.commit, is_cached(first), is_cached(second)) == (commit, False, True)
        assert known_fields(first) == known_fields(second)
        assert second.model is second.model


def test_opening_again_imports_no_torch() -> None:
    open_local("fashion-mnist")
    program = (
        "import sys; from pipeline.storage import Storage\n"
        "from pipeline.classify.checkpoint import open_checkpoint\n"
        "checkpoint = open_checkpoint(Storage(), 'fashion-mnist'); checkpoint.check_single_label()\n"
        "print(checkpoint.digest, {'torch', 'transformers', 'ray', 'boto3'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [load_checkpoint("fashion-mnist").digest, "set()"]


# Changed files -----------------------------------------------------------------------------------


def rewrite_weights(folder: Path) -> None:
    """Writes other weights with the same modification time."""
    before = (folder / WEIGHTS).stat()
    change_weights(folder / WEIGHTS)
    os.utime(folder / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_weights(folder: Path) -> None:
    """Moves a file with other weights and the same modification time over the old one."""
    other = Path(shutil.copy2(folder / WEIGHTS, folder / "other"))
    before = other.stat()
    change_weights(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(folder / WEIGHTS)


def change_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("Bag", "Bug"))


def change_preprocessing(folder: Path) -> None:
    fields = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(fields | {"crop_pct": 0.5}))


def change_names(folder: Path) -> None:
    (folder / "names.txt").write_text("\n".join("abcdefghix"))


@pytest.mark.parametrize(
    "change", [rewrite_weights, replace_weights, change_config, change_preprocessing, change_names]
)
def test_changed_file_is_read(folder: Path, change: Callable[[Path], None]) -> None:
    (folder / "names.txt").write_text("\n".join("abcdefghij"))
    labels = folder / "names.txt" if change is change_names else None
    before = open_local(folder, labels)
    assert is_cached(open_local(folder, labels))
    change(folder)
    after = open_local(folder, labels)
    assert not is_cached(after)
    assert after.digest == load_checkpoint(str(folder), labels=labels and str(labels)).digest != before.digest
    assert is_cached(open_local(folder, labels))


def test_shard_of_the_weights_is_read_after_a_change(folder: Path) -> None:
    before = open_local(as_sharded(folder))
    shard = torch.load(folder / "b.bin")
    torch.save({key: value + 1 if value.is_floating_point() else value for key, value in shard.items()},
               folder / "b.bin")  # fmt: skip
    assert open_local(folder).digest != before.digest


def test_labels_have_their_own_entries(folder: Path) -> None:
    (folder / "names.txt").write_text("\n".join("abcdefghij"))
    open_local(folder), open_local(folder, folder / "names.txt")
    own, other = open_local(folder), open_local(folder, folder / "names.txt")
    assert is_cached(own)
    assert is_cached(other)
    assert (own.labels[0], other.labels[0]) == ("T-shirt/top", "a")


# Unusable caches ---------------------------------------------------------------------------------


def entry(cache: Path) -> Path:
    (file,) = cache.iterdir()
    return file


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {
        **content,
        "checkpoint": {k: v for k, v in content["checkpoint"].items() if k != name},
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content | {"versions": content["versions"] | {"definition of the digest": "0"}},
        lambda content: content | {"versions": {}},
        lambda content: content | {"checkpoint": None},
        lambda content: [content],
        without("known_digest"),
        without("architecture"),
        lambda content: content | {"checkpoint": content["checkpoint"] | {"known_digest": None}},
        lambda content: content | {"checkpoint": content["checkpoint"] | {"architecture": {"depth": [0]}}},
    ],
)
def test_unusable_entry_is_replaced(cache: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    open_local("fashion-mnist")
    good = entry(cache).read_bytes()
    entry(cache).write_text(json.dumps(damage(json.loads(good))))
    assert not is_cached(open_local("fashion-mnist"))
    assert json.loads(entry(cache).read_bytes()) == json.loads(good)


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_truncated_entry_is_replaced(cache: Path, kept: int) -> None:
    open_local("fashion-mnist")
    good = entry(cache).read_bytes()
    entry(cache).write_bytes(good[:kept] + b"\xff" * (kept == 1))
    assert not is_cached(open_local("fashion-mnist"))
    assert entry(cache).read_bytes() == good


@pytest.mark.parametrize("problem", ["a file", "no home"])
def test_checkpoint_opens_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    if problem == "a file":
        (tmp_path / "cache").write_text("")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "expanduser", lambda self: self if "~" not in str(self) else _no_home())
    for _ in range(2):
        assert not is_cached(open_local("fashion-mnist"))


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_concurrent_writers_leave_a_complete_entry(cache: Path, folder: Path) -> None:
    known, stop = known_fields(open_local(folder)), threading.Event()
    file, times = entry(cache), itertools.count(10**18)

    def write() -> None:
        while not stop.is_set():
            os.utime(folder / "README.md", ns=(0, next(times)))  # a new version
            open_local(folder)

    (folder / "README.md").write_text("")
    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(200):
            assert json.loads(file.read_bytes())["checkpoint"] == known
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert [*cache.iterdir()] == [file]


# Loading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["known_digest", "labels", "preprocessor", "name"])
def test_wrong_entry_fails_and_is_replaced(cache: Path, folder: Path, field: str) -> None:
    known = known_fields(open_local(folder))
    content = json.loads(entry(cache).read_bytes())
    other = {
        "known_digest": "0" * 64,
        "labels": list("abcdefghij"),
        "preprocessor": content["checkpoint"]["preprocessor"] | {"crop_pct": 0.5},
        "name": "other",
    }
    content["checkpoint"][field] = other[field]
    entry(cache).write_text(json.dumps(content))
    wrong = open_local(folder)
    assert is_cached(wrong)
    assert known_fields(wrong) != known
    with pytest.raises(CheckpointError, match=f"model '{folder}': its files have changed .* run the same"):
        _ = wrong.model
    right = open_local(folder)
    assert is_cached(right)
    assert known_fields(right) == known
    assert right.model is right.model


def test_file_that_changes_before_loading_fails(folder: Path) -> None:
    open_local(folder)
    cached = open_local(folder)
    change_weights(folder / WEIGHTS)
    for _ in range(2):  # the error stays
        with pytest.raises(CheckpointError, match="its files have changed"):
            _ = cached.model
    assert open_local(folder).digest == load_checkpoint(str(folder)).digest != cached.digest


def test_file_that_changes_during_loading_gets_no_entry(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_and_change(*args: Any) -> Checkpoint:
        loaded = load_local(*args)
        change_weights(folder / WEIGHTS)
        return loaded

    monkeypatch.setattr("pipeline.classify.checkpoint.load_local", load_and_change)
    open_local(folder)
    assert not cache.exists()


def test_pickled_checkpoint_has_its_weights(folder: Path) -> None:
    open_local(folder)
    cached = open_local(folder)
    data = pickle.dumps(cached)
    shutil.rmtree(folder)
    copy = pickle.loads(data)
    assert known_fields(copy) == known_fields(cached)
    weights = cached.model.state_dict()
    assert all(torch.equal(weight, weights[key]) for key, weight in copy.model.state_dict().items())
