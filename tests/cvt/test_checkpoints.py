from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cvt.checkpoints import BUNDLED, load_checkpoint
from cvt.errors import CheckpointError

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled checkpoint, to be spoiled."""
    return Path(shutil.copytree(BUNDLED["fashion-mnist"], tmp_path / "my-model"))


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_bundled_checkpoint_loads_by_name() -> None:
    checkpoint = load_checkpoint("fashion-mnist")
    assert checkpoint.name == "fashion-mnist"
    assert checkpoint.labels[0] == "T-shirt/top"
    assert len(checkpoint.labels) == 10
    assert checkpoint.preprocessor.size == 28
    assert checkpoint.embedding_width == 128
    assert not checkpoint.model.training


def test_the_bundled_weights_are_small() -> None:
    assert (BUNDLED["fashion-mnist"] / WEIGHTS).stat().st_size <= 6 * 1024**2


def test_a_folder_loads_and_gives_its_name(folder: Path) -> None:
    checkpoint = load_checkpoint(str(folder))
    assert checkpoint.name == "my-model"
    assert checkpoint.digest == load_checkpoint("fashion-mnist").digest


def test_the_digest_depends_on_weights_labels_and_preprocessing_but_not_on_the_files(folder: Path) -> None:
    before = load_checkpoint(str(folder)).digest
    change_json(folder / "config.json", transformers_version="0.0.1")
    assert load_checkpoint(str(folder)).digest == before

    change_json(folder / "preprocessor_config.json", crop_pct=0.9)
    other_crop = load_checkpoint(str(folder)).digest
    weights = load_file(folder / WEIGHTS)
    weights["classifier.bias"][0] += 1e-6
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    other_weights = load_checkpoint(str(folder)).digest
    labels = {str(i): f"label {i}" for i in range(10)}
    change_json(folder / "config.json", id2label=labels, label2id={v: int(k) for k, v in labels.items()})
    other_labels = load_checkpoint(str(folder)).digest
    assert len({before, other_crop, other_weights, other_labels}) == 4


def test_pytorch_weights_load_as_safetensors_do(folder: Path) -> None:
    before = load_checkpoint(str(folder)).digest
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert load_checkpoint(str(folder)).digest == before


def test_half_precision_weights_are_loaded_as_float32(folder: Path) -> None:
    weights = {name: value.half() for name, value in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    change_json(folder / "config.json", dtype="float16")
    assert load_checkpoint(str(folder)).model.dtype == torch.float32


def test_a_missing_folder_is_named() -> None:
    assert "no such folder" in refusal("/nowhere/at/all")


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)


def test_a_file_is_refused(folder: Path) -> None:
    assert "this is a file" in refusal(folder / WEIGHTS)


def test_a_model_of_another_kind_is_refused(folder: Path) -> None:
    change_json(folder / "config.json", model_type="vit")
    assert "model_type 'vit', not 'cvt'" in refusal(folder)


def test_missing_and_unexpected_weights_are_refused_by_name(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["classifier.extra"] = weights.pop("classifier.bias")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    message = refusal(folder)
    assert "missing: classifier.bias" in message
    assert "unexpected: classifier.extra" in message


def test_weights_of_another_shape_are_refused_by_name(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["classifier.bias"] = torch.zeros(11)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert "of another shape than config.json says: classifier.bias" in refusal(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    assert refusal(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert WEIGHTS in refusal(folder)


def test_a_configuration_that_cannot_be_is_refused_with_its_field(folder: Path) -> None:
    change_json(folder / "config.json", num_heads=[1, 2, 5])
    assert "num_heads" in refusal(folder)


def test_class_ids_that_do_not_start_at_0_are_refused(folder: Path) -> None:
    change_json(folder / "config.json", id2label={str(i + 1): f"label {i}" for i in range(10)})
    assert "id2label" in refusal(folder)


def test_missing_or_foreign_preprocessing_is_refused(folder: Path) -> None:
    change_json(folder / "preprocessor_config.json", image_processor_type="ViTImageProcessor")
    assert "ViTImageProcessor" in refusal(folder)
    (folder / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in refusal(folder)


def test_a_hub_id_that_cannot_be_fetched_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "bundled: fashion-mnist" in refusal("someone/no-such-model")
