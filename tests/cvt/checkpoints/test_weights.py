"""Tests of reading weights from safetensors and PyTorch files."""

from __future__ import annotations

import json
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cvt.checkpoints.files import files_to_load
from cvt.checkpoints.weights import read_file, read_folder
from cvt.errors import CheckpointError

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0]), "c": torch.ones(1)}
SHARDS = {"a": "00001-of-00002", "b": "00002-of-00002", "c": "00002-of-00002"}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def write_shards(folder: Path, stem: str, suffix: str, save: Callable[[Any, Path], None]) -> Path:
    for part in sorted(set(SHARDS.values())):
        weights = {key: WEIGHTS[key] for key, shard in SHARDS.items() if shard == part}
        save(weights, folder / f"{stem}-{part}.{suffix}")
    weight_map = {key: f"{stem}-{part}.{suffix}" for key, part in SHARDS.items()}
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": weight_map}))
    return index


def read_error(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    return str(caught.value)


def test_safetensors_and_pytorch_files_are_read(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    torch.save(WEIGHTS, tmp_path / "x.pth")
    assert same(read_file(tmp_path / "model.safetensors"), WEIGHTS)
    assert same(read_file(tmp_path / "x.pth"), WEIGHTS)


def test_shards_are_read_together(tmp_path: Path) -> None:
    write_shards(tmp_path, "pytorch_model", "bin", torch.save)
    assert same(read_folder(tmp_path), WEIGHTS)
    for file in tmp_path.iterdir():
        file.unlink()
    write_shards(tmp_path, "model", "safetensors", save_file)
    assert same(read_folder(tmp_path), WEIGHTS)


def test_first_kind_of_weights_is_read(tmp_path: Path) -> None:
    kinds = []
    for kind in ("pytorch_model.bin", "model.safetensors"):
        weights = {"a": torch.full((1,), float(len(kinds)))}
        (save_file if kind.endswith("safetensors") else torch.save)(weights, tmp_path / kind)
        kinds.append(weights)
    (tmp_path / "tf_model.h5").write_bytes(b"not read")
    assert same(read_folder(tmp_path), kinds[1])
    (tmp_path / "model.safetensors").unlink()
    assert same(read_folder(tmp_path), kinds[0])


def test_files_to_load_are_configuration_and_one_kind_of_weights() -> None:
    config = ["config.json", "preprocessor_config.json"]
    others = [
        "README.md",
        "onnx/model.safetensors",
        "training_args.bin",
        "vocab.json",
        "model.onnx",
        ".gitattributes",
    ]
    both = ["pytorch_model.bin", "tf_model.h5", *config, *others]
    assert files_to_load(["model.safetensors", *both]) == [*config, "model.safetensors"]
    assert files_to_load(both) == [*config, "pytorch_model.bin"]
    assert files_to_load(["tf_model.h5", *config]) == [*config, "tf_model.h5"]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "model.safetensors.index.json"
    assert files_to_load([*shards, index, *both]) == [*config, index, *shards]
    assert files_to_load(others) == []


def test_folder_without_weights_fails_and_lists_file_names(tmp_path: Path) -> None:
    message = read_error(read_folder, tmp_path)
    for name in ("model.safetensors", "pytorch_model.bin", "tf_model.h5"):
        assert name in message


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, "model", "safetensors", save_file)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.unlink()
    assert str(shard) in read_error(read_folder, tmp_path)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["x"]}}'],
)
def test_invalid_index_is_named(tmp_path: Path, content: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    assert f"{index}: not an index" in read_error(read_folder, tmp_path)


def test_index_cannot_refer_to_another_folder(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert "not a file name without a folder" in read_error(read_folder, folder)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "ema.", "module._orig_mod.", ""])
def test_weights_of_a_training_script_are_unwrapped(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    weights: dict[str, Any] = OrderedDict((f"{prefix}{key}", tensor) for key, tensor in WEIGHTS.items())
    if wrapper == "state_dict":  # the format of Microsoft's lib/utils/utils.py
        weights = {
            "epoch": 3,
            "model": "cls_cvt",
            "state_dict": weights,
            "perf": 0.5,
            "optimizer": {"state": {}},
        }
    elif wrapper:
        weights = {wrapper: weights}
    torch.save(weights, tmp_path / "x.pth")
    assert same(read_file(tmp_path / "x.pth"), WEIGHTS)


EMA = {key: tensor + 1 for key, tensor in WEIGHTS.items()}


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in weights.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": WEIGHTS, "state_dict_ema": EMA},
        {"model_ema": EMA, "model": WEIGHTS},
        {"state_dict": prefixed("model.", WEIGHTS) | prefixed("ema.", EMA)},
        prefixed("module.", WEIGHTS) | prefixed("ema_model.module.", EMA),
    ],
)
def test_choice_between_weights_and_their_average_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: dict[str, Any]
) -> None:
    torch.save(content, tmp_path / "x.pth")
    assert same(read_file(tmp_path / "x.pth"), WEIGHTS)
    assert caplog.messages == [
        "x.pth has weights and their moving average (EMA): loading the weights without averaging"
    ]


@pytest.mark.parametrize(
    "content",
    [
        {"model_ema": prefixed("module.", EMA), "epoch": 3},
        {"state_dict_ema": EMA},
        prefixed("ema.", EMA),
        {"n_averaged": torch.tensor(7), **prefixed("module.", EMA)},  # torch.optim.swa_utils.AveragedModel
    ],
)
def test_file_with_only_an_average_is_read_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: dict[str, Any]
) -> None:
    torch.save(content, tmp_path / "x.pth")
    assert same(read_file(tmp_path / "x.pth"), EMA)
    assert not caplog.messages


def test_file_of_pytorch_before_1_6_fails(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert "written before PyTorch 1.6" in read_error(read_file, tmp_path / "x.pth")


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("wrapped", [False, True])
def test_pickled_code_fails_and_does_not_run(tmp_path: Path, wrapped: bool) -> None:
    trace, file = tmp_path / "trace", tmp_path / "x.pth"
    content: Any = {"state_dict": WEIGHTS, "more": Touch(trace)} if wrapped else Touch(trace)
    torch.save(content, file)
    message = read_error(read_file, file)
    assert str(file) in message
    assert "not unpickled" in message
    assert "weights_only" not in message  # PyTorch's message explains how to run the code
    assert not trace.exists()
    torch.load(file, weights_only=False)  # proves that the file would run code
    assert trace.exists()


def test_values_that_weights_only_accepts_are_read(tmp_path: Path) -> None:
    tensor, parameter = torch.ones(1), torch.nn.Parameter(torch.ones(1))
    tensor.note = parameter.note = "x"  # type: ignore[attr-defined]
    more = {
        "bytes": b"\xff text",
        "tensor with an attribute": tensor,
        "parameters": [parameter, torch.nn.Parameter(torch.ones(1))],
        "dtypes": [torch.complex64, torch.bfloat16, torch.float8_e4m3fn],
        "complex": torch.zeros(2, dtype=torch.complex64),
        "torch": [torch.Size([1]), torch.device("cpu")],
        "plain": [1j, {1}, Counter("a"), OrderedDict(a=1)],
        "sparse": torch.eye(2).to_sparse(),
    }
    torch.save({"state_dict": WEIGHTS, **more}, tmp_path / "x.pth")
    assert same(read_file(tmp_path / "x.pth"), WEIGHTS)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ([1, 2], "the content is a list, not a mapping"),
        ({"a": 1.5}, "'a' is a float, not a tensor"),
        ({"model": {"a": "x"}}, "'a' is a str"),
    ],
)
def test_file_without_weights_is_named(tmp_path: Path, content: object, cause: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    message = read_error(read_file, tmp_path / "x.pth")
    assert str(tmp_path / "x.pth") in message
    assert cause in message


@pytest.mark.parametrize("name", ["x.pth", "model.safetensors"])
def test_truncated_or_invalid_file_is_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(WEIGHTS, file)
    whole = file.read_bytes()
    for content in (
        whole[: len(whole) // 2],
        b"",
        b"<html>no such page</html>",
        pickle.dumps("text", protocol=2),
    ):
        file.write_bytes(content)
        assert str(file) in read_error(read_file, file)
