"""Tests of the command `convert`: transformers loads the converted checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.testing import assert_close

import jobs.convert
from cvt.architecture import FIELDS
from cvt.checkpoints import BUNDLED, load_checkpoint
from tests.command import invoke
from tests.cvt.microsoft_names import as_microsoft
from tests.cvt.random_models import randomize, shallow

FOLDER = BUNDLED["fashion-mnist"]
DEPTH = [1, 2, 3]  # of the bundled checkpoint
FILE = "CvT-13-384x384-IN-1k.pth"


def convert(*arguments: object, status: int = 0) -> str:
    """Runs the command and returns its output."""
    return invoke(jobs.convert.convert, *arguments, status=status).output


@pytest.fixture(scope="module")
def published(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, transformers.CvtForImageClassification]:
    """A Microsoft file with random weights for CvT-13, and transformers' model with the same weights."""
    with torch.device("meta"):
        model = transformers.CvtForImageClassification(transformers.CvtConfig(num_labels=3))
    model = randomize(model.to_empty(device="cpu"))
    file = tmp_path_factory.mktemp("published") / FILE
    torch.save(as_microsoft(model.state_dict(), model.config.depth), file)
    return file, model


@pytest.mark.slow
@torch.inference_mode()
def test_microsofts_file_becomes_a_folder_that_transformers_loads(
    published: tuple[Path, transformers.CvtForImageClassification], tmp_path: Path
) -> None:
    file, model = published
    labels, target = tmp_path / "labels.txt", tmp_path / "new" / "cvt-13-384"
    labels.write_text("cat\ndog\neel\n")
    output = convert(file, target, "--labels", labels)
    assert output == f"{target}: CvT-13-384x384-IN-1k, 3 classes, 384 pixels\n"
    assert sorted(path.name for path in target.parent.iterdir()) == ["cvt-13-384"]
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    converted, info = transformers.CvtForImageClassification.from_pretrained(target, output_loading_info=True)
    assert not any(info.values())
    assert converted.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    written = json.loads((target / "config.json").read_text())
    assert written.keys() >= {*FIELDS} | {"id2label", "label2id", "model_type"}

    processor = transformers.AutoImageProcessor.from_pretrained(target)
    noise = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    pixels = processor(Image.fromarray(noise), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 384, 384)
    logits = model(pixels).logits
    assert logits.std() > 0.01
    assert_close(converted.eval()(pixels).logits, logits)

    checkpoint = load_checkpoint(str(target))
    assert checkpoint.digest == load_checkpoint(str(file), labels=str(labels)).digest
    assert checkpoint.labels == ("cat", "dog", "eel")

    back = tmp_path / FILE
    convert(target, back, "--to", "microsoft")
    assert load_checkpoint(str(back)).digest == load_checkpoint(str(file)).digest


def test_bundled_checkpoint_survives_conversion_to_microsoft_and_back(tmp_path: Path) -> None:
    file = tmp_path / "clothes.pth"
    output = convert("fashion-mnist", file, "--to", "microsoft")
    assert "clothes.pth will load with an image size of 224 pixels" in output
    weights = torch.load(file, weights_only=True)
    expected = as_microsoft(load_checkpoint("fashion-mnist").model.state_dict(), DEPTH)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)

    # The architecture is not a published variant, so loading needs a config.json.
    assert "no published variant of CvT has embed_dim [32, 64, 128]" in convert(
        file, tmp_path / "x", status=4
    )
    folder = tmp_path / "clothes"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_bytes((FOLDER / name).read_bytes())
    file.rename(folder / "pytorch_model.bin")
    convert(folder, tmp_path / "again")
    assert load_checkpoint(str(tmp_path / "again")).digest == load_checkpoint("fashion-mnist").digest


def test_size_option_sets_the_image_size(tmp_path: Path) -> None:
    assert "224 pixels" in convert("fashion-mnist", tmp_path / "clothes", "--size", "224")
    assert load_checkpoint(str(tmp_path / "clothes")).preprocessor.size == 224
    assert "256" in convert("fashion-mnist", tmp_path / "x", "--size", "256", status=2)


def test_activation_option_is_stored_and_changes_the_digest(tmp_path: Path) -> None:
    output = convert("fashion-mnist", tmp_path / "quick", "--activation", "quick_gelu")
    assert "transformers computes other logits for this model: its CvT ignores hidden_act" in output
    assert json.loads((tmp_path / "quick" / "config.json").read_text())["hidden_act"] == "quick_gelu"
    quick, gelu = load_checkpoint(str(tmp_path / "quick")), load_checkpoint("fashion-mnist")
    assert quick.digest != gelu.digest
    assert "transformers" not in convert(tmp_path / "quick", tmp_path / "gelu", "--activation", "gelu")
    assert load_checkpoint(str(tmp_path / "gelu")).digest == gelu.digest
    output = convert(tmp_path / "quick", tmp_path / "cvt_224.pth", "--to", "microsoft")
    assert "cvt_224.pth will load with GELU: a Microsoft file does not store the activation" in output
    arguments = "--to", "microsoft", "--activation", "gelu"
    assert "does not store the activation" in convert(
        "fashion-mnist", tmp_path / "x.pth", *arguments, status=2
    )


def test_model_that_transformers_cannot_load_is_reported(tmp_path: Path) -> None:
    shallow(tmp_path / "shallow")
    output = convert(tmp_path / "shallow", tmp_path / "converted")
    assert "transformers cannot load this model: its CvT needs depth[1] > 1, not 1" in output
    with pytest.raises(IndexError):
        transformers.CvtForImageClassification.from_pretrained(tmp_path / "converted")
    again = load_checkpoint(str(tmp_path / "converted"))
    assert again.digest == load_checkpoint(str(tmp_path / "shallow")).digest


def test_multi_label_model_stays_one(tmp_path: Path) -> None:
    source = Path(shutil.copytree(FOLDER, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    convert(source, tmp_path / "converted")
    written = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert written["problem_type"] == "multi_label_classification"


def test_target_that_cannot_be_written_ends_with_4() -> None:
    target = Path("/proc/models/mine")
    assert f"{target}: No such file or directory" in convert("fashion-mnist", target, status=4)


def test_existing_target_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pth").write_bytes(b"mine")
    assert "exists" in convert("fashion-mnist", tmp_path / "empty", status=2)
    assert "exists" in convert("fashion-mnist", tmp_path / "x.pth", "--to", "microsoft", status=2)
    assert (tmp_path / "x.pth").read_bytes() == b"mine"
    assert list((tmp_path / "empty").iterdir()) == []


def test_microsoft_file_needs_pth_suffix(tmp_path: Path) -> None:
    assert "must end with .pth" in convert("fashion-mnist", tmp_path / "x", "--to", "microsoft", status=2)


def test_unloadable_source_ends_with_4_and_leaves_no_files(tmp_path: Path) -> None:
    assert "no such folder" in convert("/no/such/model", tmp_path / "out", status=4)
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\n")
    output = convert("fashion-mnist", tmp_path / "out", "--labels", labels, status=4)
    assert "number of names: 1, number of classes of the model: 10" in output
    assert list(tmp_path.iterdir()) == [labels]


@pytest.mark.parametrize("target", ["s3://bucket/model", "new.pth", "file.txt/below"])
def test_invalid_target_ends_with_2(tmp_path: Path, target: str) -> None:
    (tmp_path / "file.txt").write_text("a file")
    place = target if "://" in target else str(tmp_path / target)
    convert("/no/such/model", place, status=2)  # checked before the model is loaded
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_weights_without_classifier_end_with_4(tmp_path: Path) -> None:
    source = tmp_path / "features"
    load_checkpoint("fashion-mnist").to_transformers().cvt.save_pretrained(source)
    shutil.copy(FOLDER / "preprocessor_config.json", source)
    assert "the checkpoint has no classifier" in convert(source, tmp_path / "converted", status=4)
