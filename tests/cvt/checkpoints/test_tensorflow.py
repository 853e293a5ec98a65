from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cvt.configuration import CvtConfig
from cvt.errors import CheckpointError
from cvt.modeling import CvtForImageClassification
from tests.cvt.random_models import PUBLISHED, TINY, randomise

h5py = pytest.importorskip("h5py", reason="needs the extra `keras`")

from cvt.checkpoints.tensorflow import read_h5, write_h5  # noqa: E402
from cvt.checkpoints.weights import check_weights, read_file  # noqa: E402

#: Saved by transformers' TFCvtForImageClassification; made by data/make_tf_fixture.py.
TF_TINY = Path(__file__).parents[1] / "data" / "tf-tiny"

FOUR_STAGES = {
    name: [value[1]] * 4 for name, value in vars(CvtConfig).items() if isinstance(value, tuple)
} | {
    "embed_dim": [4, 8, 12, 16],
    "num_heads": [1, 2, 3, 4],
    "depth": [1, 2, 1, 11],
    "cls_token": [False, False, False, True],
}


def random_model(**fields: Any) -> CvtForImageClassification:
    return randomise(CvtForImageClassification(CvtConfig(**TINY | fields)))


def weights_of(model: CvtForImageClassification) -> dict[str, Tensor]:
    """Weights, without counts of batches."""
    state = model.state_dict()
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def check(path: Path) -> None:
    """Reads a file as the weights of the model of the fixture."""
    with torch.device("meta"):
        model = CvtForImageClassification(CvtConfig.from_pretrained(TF_TINY))
    check_weights(read_file(path), model.state_dict())


def layout(path: Path) -> dict[str, Any]:
    """Attributes and datasets of a file, by name."""
    found: dict[str, Any] = {}
    with h5py.File(path) as file:
        found["/"] = {name: np.asarray(value).tolist() for name, value in file.attrs.items()}

        def visit(name: str, value: Any) -> None:
            found[name] = {name: np.asarray(value).tolist() for name, value in value.attrs.items()}
            if isinstance(value, h5py.Dataset):
                found[name] = (value.dtype, value[()].tolist())

        file.visititems(visit)
    return found


def test_weights_of_the_tensorflow_class_give_its_outputs() -> None:
    model = CvtForImageClassification(CvtConfig.from_pretrained(TF_TINY)).eval()
    outcome = model.load_state_dict(read_h5(TF_TINY / "tf_model.h5"), strict=False)
    assert not outcome.unexpected_keys
    assert all(key.endswith(".num_batches_tracked") for key in outcome.missing_keys)
    wanted = np.load(TF_TINY / "outputs.npz")
    with torch.no_grad():
        got = model(torch.from_numpy(wanted["pixel_values"]), output_hidden_states=True)
    assert np.ptp(wanted["logits"], axis=0).max() > 0.5  # the images show in them
    assert_close(got.logits, torch.from_numpy(wanted["logits"]), rtol=1e-4, atol=1e-5)
    assert_close(got.hidden_states[-1], torch.from_numpy(wanted["last_hidden_state"]), rtol=1e-4, atol=1e-5)


def test_what_was_read_is_written_as_the_tensorflow_class_wrote_it(tmp_path: Path) -> None:
    """The same groups, attributes in the same order, names, shapes and values: a drop-in file."""
    model = CvtForImageClassification(CvtConfig.from_pretrained(TF_TINY))
    model.load_state_dict(read_h5(TF_TINY / "tf_model.h5"), strict=False)
    write_h5(model.state_dict(), model.config, tmp_path / "tf_model.h5")
    assert layout(tmp_path / "tf_model.h5") == layout(TF_TINY / "tf_model.h5")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qkv_bias": [False, True, False]},
        {"cls_token": [False] * 3},
        {"num_labels": 1},
        FOUR_STAGES,
        PUBLISHED["cvt-21"] | {"embed_dim": [2, 4, 6], "num_heads": [1, 1, 1]},
    ],
    ids=["tiny", "biases", "no class token", "one label", "four stages", "depth of cvt-21"],
)
def test_what_was_written_is_read_again(fields: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(**fields)
    state = weights_of(model)
    write_h5(model.state_dict(), model.config, tmp_path / "tf_model.h5")
    again = read_h5(tmp_path / "tf_model.h5")
    assert again.keys() == state.keys()
    for key, wanted in state.items():
        assert_close(again[key], wanted, rtol=0, atol=0, msg=key)


def test_features_without_a_classifier_are_those_of_a_tf_cvt_model(tmp_path: Path) -> None:
    model = random_model()
    state = {key: value for key, value in weights_of(model).items() if key.startswith("cvt.")}
    write_h5(state, model.config, tmp_path / "tf_model.h5")
    assert read_h5(tmp_path / "tf_model.h5").keys() == state.keys()
    names = layout(tmp_path / "tf_model.h5")
    assert names["/"]["layer_names"] == ["cvt"]
    assert "cvt/tf_cvt_model/cvt/encoder/stages.1/layers.1/attention/output/dense/kernel:0" in names


def test_a_file_of_the_second_model_of_its_process_is_read_as_well(tmp_path: Path) -> None:
    """Keras numbered models of the same name, from the second one on."""
    path = tmp_path / "tf_model.h5"
    with h5py.File(TF_TINY / "tf_model.h5") as source, h5py.File(path, "w") as target:
        model = "tf_cvt_for_image_classification"
        for group in ("cvt", "layernorm", "classifier"):
            source.copy(f"{group}/{model}", target, f"{group}/{model}_1")
        source.copy("cvt/cvt.encoder.stages.2.cls_token:0", target["cvt"])
    assert read_h5(path).keys() == read_h5(TF_TINY / "tf_model.h5").keys()


def test_half_precision_is_written_as_float32(tmp_path: Path) -> None:
    model = random_model()
    state = weights_of(model)
    write_h5({key: value.half() for key, value in state.items()}, model.config, tmp_path / "tf_model.h5")
    for key, value in read_h5(tmp_path / "tf_model.h5").items():
        assert_close(value, state[key].half().float(), rtol=0, atol=0)


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
def test_a_missing_dataset_is_named(dataset: str, missing: str, tmp_path: Path) -> None:
    path = Path(shutil.copy(TF_TINY / "tf_model.h5", tmp_path))
    with h5py.File(path, "a") as file:
        del file[dataset]
    with pytest.raises(CheckpointError, match=f"missing: {re.escape(missing)}$"):
        check(path)


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
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
def test_an_unknown_dataset_is_named(name: str, value: Any, tmp_path: Path) -> None:
    path = Path(shutil.copy(TF_TINY / "tf_model.h5", tmp_path))
    with h5py.File(path, "a") as file:
        file[name] = value
    with pytest.raises(
        CheckpointError, match=r"(unexpected: |tf_model\.h5: )[\w./:]*(pooler|vit|weights|Adam)"
    ):
        check(path)


def test_numbers_that_are_no_weights_are_named(tmp_path: Path) -> None:
    path = Path(shutil.copy(TF_TINY / "tf_model.h5", tmp_path))
    name = "classifier/tf_cvt_for_image_classification/classifier/bias:0"
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = np.arange(4)
    with pytest.raises(CheckpointError, match=f"{path}: {name} is not the dataset of a weight"):
        check(path)


def test_a_weight_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = Path(shutil.copy(TF_TINY / "tf_model.h5", tmp_path))
    with h5py.File(path, "a") as file:
        file["classifier/tf_cvt_for_image_classification_1/classifier/bias:0"] = np.zeros(4, "float32")
    with pytest.raises(CheckpointError, match=r"classifier/tf_cvt_for_image_classification_1/\S* is not the"):
        check(path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tf_model.h5"
    with h5py.File(path, "w") as file:
        file["title"] = "no weights at all"
    with pytest.raises(CheckpointError, match=r"tf_model\.h5: title is not the dataset of a weight"):
        read_file(path)
    path.write_bytes((TF_TINY / "tf_model.h5").read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"tf_model\.h5: .*truncated file"):
        read_file(path)
    with pytest.raises(CheckpointError, match=r"none\.h5: .*No such file"):
        read_file(tmp_path / "none.h5")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"qkv_projection_method": ["dw_bn", "avg", "dw_bn"]}, "no qkv_projection_method other than 'dw_bn'"),
        ({"embed_dim": [48] * 3, "cls_token": [True, False, True]}, "no class token before the last stage"),
        ({"embed_dim": [48] * 3, "cls_token": [False, True, False]}, "no class token before the last stage"),
        ({"num_labels": 0}, "no classification without labels"),
    ],
    ids=["avg", "two class tokens", "class token in the middle", "no labels"],
)
def test_weights_that_the_tensorflow_classes_cannot_have_are_refused(
    fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = random_model(**fields)
    with pytest.raises(CheckpointError, match=reason):
        write_h5(model.state_dict(), model.config, tmp_path / "tf_model.h5")
    assert not list(tmp_path.iterdir())
