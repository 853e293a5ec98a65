"""Tests of reading TensorFlow weights of transformers 4."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cvt.errors import CheckpointError
from cvt.modeling import CvtConfig, CvtForImageClassification

h5py = pytest.importorskip("h5py", reason="needs the extra `keras`")

from cvt.checkpoints.tensorflow import read_h5  # noqa: E402
from cvt.checkpoints.weights import check_weights, read_file  # noqa: E402

#: A checkpoint of transformers' TFCvtForImageClassification, created by data/make_tf_fixture.py.
TF_TINY = Path(__file__).parents[1] / "data" / "tf-tiny"


def check(path: Path) -> None:
    """Reads weights from a file and checks that they fit the model of the fixture."""
    with torch.device("meta"):
        model = CvtForImageClassification(CvtConfig.from_pretrained(TF_TINY))
    check_weights(read_file(path), model.state_dict())


def test_tensorflow_weights_give_the_tensorflow_outputs() -> None:
    model = CvtForImageClassification(CvtConfig.from_pretrained(TF_TINY)).eval()
    outcome = model.load_state_dict(read_h5(TF_TINY / "tf_model.h5"), strict=False)
    assert not outcome.unexpected_keys
    assert all(key.endswith(".num_batches_tracked") for key in outcome.missing_keys)
    expected = np.load(TF_TINY / "outputs.npz")
    with torch.no_grad():
        actual = model(torch.from_numpy(expected["pixel_values"]), output_hidden_states=True)
    assert np.ptp(expected["logits"], axis=0).max() > 0.5  # the logits depend on the image
    assert_close(actual.logits, torch.from_numpy(expected["logits"]), rtol=1e-4, atol=1e-5)
    assert_close(
        actual.hidden_states[-1], torch.from_numpy(expected["last_hidden_state"]), rtol=1e-4, atol=1e-5
    )


def test_weights_of_tf_cvt_model_have_no_classifier(tmp_path: Path) -> None:
    path = tmp_path / "tf_model.h5"
    with h5py.File(TF_TINY / "tf_model.h5") as source, h5py.File(path, "w") as target:
        source.copy("cvt/tf_cvt_for_image_classification", target, "cvt/tf_cvt_model")
        source.copy("cvt/cvt.encoder.stages.2.cls_token:0", target["cvt"])
    expected = {key for key in read_h5(TF_TINY / "tf_model.h5") if key.startswith("cvt.")}
    assert read_h5(path).keys() == expected


def test_file_of_a_second_keras_model_is_read(tmp_path: Path) -> None:
    """Keras adds a number to the name of the second model with the same name."""
    path = tmp_path / "tf_model.h5"
    with h5py.File(TF_TINY / "tf_model.h5") as source, h5py.File(path, "w") as target:
        model = "tf_cvt_for_image_classification"
        for group in ("cvt", "layernorm", "classifier"):
            source.copy(f"{group}/{model}", target, f"{group}/{model}_1")
        source.copy("cvt/cvt.encoder.stages.2.cls_token:0", target["cvt"])
    assert read_h5(path).keys() == read_h5(TF_TINY / "tf_model.h5").keys()


LAYER = "cvt/tf_cvt_for_image_classification/cvt/encoder/stages.2/layers.1/"


@pytest.mark.parametrize(
    ("dataset", "missing"),
    [
        (
            f"{LAYER}attention/attention/convolution_projection_key/convolution_projection/normalization/gamma:0",
            "cvt.encoder.stages.2.layers.1.attention.attention.convolution_projection_key"
            ".convolution_projection.normalization.weight",
        ),
        (
            f"{LAYER}attention/attention/projection_key/bias:0",
            "cvt.encoder.stages.2.layers.1.attention.attention.projection_key.bias",
        ),
        ("classifier/tf_cvt_for_image_classification/classifier/bias:0", "classifier.bias"),
    ],
    ids=["batch norm", "bias of keys", "classifier"],
)
def test_missing_dataset_is_named(dataset: str, missing: str, tmp_path: Path) -> None:
    path = Path(shutil.copy(TF_TINY / "tf_model.h5", tmp_path))
    with h5py.File(path, "a") as file:
        del file[dataset]
    with pytest.raises(CheckpointError, match=f"missing: {re.escape(missing)}$"):
        check(path)


def test_missing_layer_is_named(tmp_path: Path) -> None:
    path = Path(shutil.copy(TF_TINY / "tf_model.h5", tmp_path))
    with h5py.File(path, "a") as file:
        del file[LAYER.rstrip("/")]
    with pytest.raises(CheckpointError, match=r"missing: cvt\.encoder\.stages\.2\.layers\.1\..* and 23 more"):
        check(path)


@pytest.mark.parametrize(
    "name",
    [
        "cvt/tf_cvt_for_image_classification/cvt/pooler/kernel:0",
        "vit/tf_vit_model/vit/kernel:0",
        "weights",
        "cvt/cvt.encoder.stages.2.cls_token.Adam:0",
    ],
)
@pytest.mark.parametrize("value", [np.zeros((2, 2), "float32"), np.zeros(3), np.int64(7)], ids=str)
def test_unknown_dataset_is_named(name: str, value: Any, tmp_path: Path) -> None:
    path = Path(shutil.copy(TF_TINY / "tf_model.h5", tmp_path))
    with h5py.File(path, "a") as file:
        file[name] = value
    with pytest.raises(
        CheckpointError, match=r"(unexpected: |tf_model\.h5: )[\w./:]*(pooler|vit|weights|Adam)"
    ):
        check(path)


def test_integer_dataset_is_named(tmp_path: Path) -> None:
    path = Path(shutil.copy(TF_TINY / "tf_model.h5", tmp_path))
    name = "classifier/tf_cvt_for_image_classification/classifier/bias:0"
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = np.arange(4)
    with pytest.raises(CheckpointError, match=f"{path}: {name}: not the dataset of a weight"):
        check(path)


def test_duplicate_weight_is_named(tmp_path: Path) -> None:
    path = Path(shutil.copy(TF_TINY / "tf_model.h5", tmp_path))
    with h5py.File(path, "a") as file:
        file["classifier/tf_cvt_for_image_classification_1/classifier/bias:0"] = np.zeros(4, "float32")
    with pytest.raises(CheckpointError, match=r"classifier/tf_cvt_for_image_classification_1/\S*: not the"):
        check(path)


def test_file_without_weights_fails(tmp_path: Path) -> None:
    path = tmp_path / "tf_model.h5"
    with h5py.File(path, "w") as file:
        file["title"] = "not weights"
    with pytest.raises(CheckpointError, match=r"tf_model\.h5: title: not the dataset of a weight"):
        read_file(path)
    path.write_bytes((TF_TINY / "tf_model.h5").read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"tf_model\.h5: .*truncated file"):
        read_file(path)
    with pytest.raises(CheckpointError, match=r"none\.h5: .*No such file"):
        read_file(tmp_path / "none.h5")
