"""Tests of the Keras models against the PyTorch models and transformers' TensorFlow classes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from cvt.checkpoints import BUNDLED
from cvt.errors import CheckpointError
from cvt.modeling import CvtConfig, CvtForImageClassification, CvtModel
from tests.cvt.random_models import FOUR_STAGES, PUBLISHED, TINY, randomize

os.environ["KERAS_BACKEND"] = "torch"  # read at the import of keras; PyTorch is always installed
keras = pytest.importorskip("keras", reason="needs the extra `keras`")

from cvt.keras import TFCvtForImageClassification, TFCvtModel, TFCvtOutput  # noqa: E402
from cvt.keras.layers import CvtLayer  # noqa: E402

#: As in test_modeling: the widths and heads of cvt-w24, with a smaller depth.
SHAPES = PUBLISHED | {"cvt-w24": PUBLISHED["cvt-w24"] | {"depth": [2, 2, 3]}}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TF_TINY = Path(__file__).parents[1] / "data" / "tf-tiny"

# Keras converts PyTorch tensors to arrays in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Twins = tuple[TFCvtForImageClassification, CvtForImageClassification]


def twins(**fields: Any) -> Twins:
    """Returns the Keras and the PyTorch model, with the same random weights."""
    with torch.device("meta"):
        model = CvtForImageClassification(CvtConfig(**{"num_labels": 10} | fields))
    theirs = randomize(model.to_empty(device="cpu"))
    return TFCvtForImageClassification.from_torch(theirs), theirs


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def classes_to_learn(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images of three classes, which differ in brightness."""
    labels = np.arange(count) % 3
    return images(count, 3, 32, 32).numpy() + labels[:, None, None, None].astype("float32"), labels


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_logits_and_hidden_states_equal_pytorch(name: str) -> None:
    ours, theirs = twins(**SHAPES[name])
    pixels = images(1, 3, 224, 224)
    actual, expected = (model(pixels, output_hidden_states=True) for model in (ours, theirs))
    assert expected.logits.std() > 0.1
    assert_close(actual.logits, expected.logits, **CLOSE)
    assert_close(actual.hidden_states, expected.hidden_states, **CLOSE)


@torch.inference_mode()
def test_quick_gelu_equals_pytorch() -> None:
    ours, theirs = twins(**TINY, hidden_act="quick_gelu")
    pixels = images(1, 3, 48, 48)
    assert_close(ours(pixels).logits, theirs(pixels).logits, **CLOSE)
    again = TFCvtForImageClassification.from_config(ours.get_config())
    assert again.config.hidden_act == "quick_gelu"


@pytest.mark.parametrize(
    "fields",
    [
        {"qkv_bias": [False, True, False]},
        {"kernel_qkv": [5, 3, 1], "padding_q": [2, 1, 0], "padding_kv": [0, 1, 0], "stride_kv": [3, 1, 2]},
        {"mlp_ratio": [2.5, 1.0, 3.0]},
        {"patch_sizes": [4, 2, 3], "patch_stride": [4, 2, 1], "patch_padding": [0, 0, 1]},
        {"num_channels": 1},
        {"num_labels": 0},
        {"cls_token": [False] * 3},
        {"embed_dim": [48] * 3, "num_heads": [1, 2, 3], "cls_token": [True, False, True]},
        {"drop_rate": [0.5] * 3, "attention_drop_rate": [0.5] * 3, "drop_path_rate": [0.5] * 3},
        {"qkv_projection_method": ["dw_bn", "linear", "dw_bn"]},
        FOUR_STAGES,
    ],
    ids=lambda fields: ", ".join(fields) if len(fields) < 9 else "four stages",
)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (70, 101)])
@torch.inference_mode()
def test_each_configuration_field_acts_as_in_pytorch(fields: dict[str, Any], height: int, width: int) -> None:
    ours, theirs = twins(**TINY | fields)
    pixels = images(2, fields.get("num_channels", 3), height, width)
    assert_close(ours(pixels).logits, theirs(pixels).logits, **CLOSE)
    actual, expected = ours.cvt(pixels), theirs.cvt(pixels)
    assert_close(actual.last_hidden_state, expected.last_hidden_state, **CLOSE)
    assert_close(actual.cls_token_value, expected.cls_token_value, **CLOSE)


@torch.inference_mode()
def test_outputs_are_indexed_by_name_and_position() -> None:
    ours, theirs = twins(**TINY)
    pixels, labels = images(2, 3, 32, 32), torch.tensor([3, 7])
    for arguments in (
        {},
        {"labels": labels},
        {"output_hidden_states": True},
        {"labels": labels, "output_hidden_states": True},
    ):
        actual, expected = ours(pixels, **arguments), theirs(pixels, **arguments)
        assert isinstance(actual, TFCvtOutput)
        assert list(actual.keys()) == list(expected.keys())
        assert len(actual) == len(expected)
        assert_close(actual[0], expected[0], **CLOSE)
        assert_close(actual["logits"], expected["logits"], **CLOSE)
        assert_close(actual[:2], expected[:2], **CLOSE)
        assert_close(actual.to_tuple(), expected.to_tuple(), **CLOSE)
        assert (actual.loss is None, actual.hidden_states is None) == (
            expected.loss is None,
            expected.hidden_states is None,
        )
        assert_close(ours(pixels, **arguments, return_dict=False), expected.to_tuple(), **CLOSE)
    with pytest.raises(KeyError, match="attentions"):
        actual["attentions"]
    with pytest.raises(KeyError, match="loss"):
        ours(pixels)["loss"]
    features = ours.cvt(pixels)
    assert isinstance(features, TFCvtOutput)
    assert list(features.keys()) == ["last_hidden_state", "cls_token_value"]
    assert features.hidden_states is None
    assert type(ours.cvt(pixels, return_dict=False)) is tuple


@torch.inference_mode()
def test_arguments_may_be_in_a_mapping() -> None:
    ours, _ = twins(**TINY)
    pixels, labels = images(2, 3, 32, 32), torch.tensor([3, 7])
    expected = ours(pixels, labels=labels, output_hidden_states=True)
    given: dict[str, Any] = {"pixel_values": pixels, "labels": labels, "output_hidden_states": True}
    for inputs in (given, transformers.BatchFeature(given)):
        assert_close(ours(inputs).to_tuple(), expected.to_tuple(), rtol=0, atol=0)
    assert_close(
        ours({"pixel_values": pixels.numpy()}, labels=labels.numpy()).loss, expected.loss, rtol=0, atol=0
    )
    with pytest.raises(ValueError, match="You have to specify pixel_values"):
        ours({"labels": labels})
    with pytest.raises(TypeError, match="pixels"):
        ours({"pixels": pixels})


@torch.inference_mode()
def test_configuration_sets_default_outputs() -> None:
    model = TFCvtForImageClassification(CvtConfig(**TINY, output_hidden_states=True))
    pixels = images(1, 3, 64, 64)
    assert [tuple(state.shape) for state in model(pixels).hidden_states] == [
        (1, 16, 16, 16),
        (1, 32, 8, 8),
        (1, 48, 4, 4),
    ]
    assert model(pixels, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert type(model(pixels)) is tuple


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [(10, torch.tensor([3, 7])), (1, torch.tensor([[0.5], [-2.0]])), (1, torch.tensor([0.5, -2.0]))],
    ids=["classes", "values (B, 1)", "values (B,)"],
)
@torch.inference_mode()
def test_losses_equal_pytorch(num_labels: int, labels: Tensor) -> None:
    ours, theirs = twins(**TINY, num_labels=num_labels)
    pixels = images(2, 3, 32, 32)
    actual = ours(pixels, labels=labels).loss
    assert actual.shape == ()
    assert_close(actual, theirs(pixels, labels=labels).loss, **CLOSE)


@pytest.mark.parametrize("labels_among_inputs", [False, True])
def test_training_step_changes_weights_as_in_pytorch(labels_among_inputs: bool) -> None:
    ours, theirs = twins(**TINY, drop_path_rate=[0.0] * 3)
    before = ours.to_torch().state_dict()
    pixels, labels = images(4, 3, 64, 64), torch.tensor([3, 7, 0, 1])
    rate = 100.0  # large enough that updates exceed the rounding of weights
    ours.compile(keras.optimizers.SGD(rate))
    given = {"pixel_values": pixels.numpy()}
    if labels_among_inputs:
        loss = ours.train_on_batch(given | {"labels": labels.numpy()})
    else:
        loss = ours.train_on_batch(given, labels.numpy())
    expected = theirs.train()(pixels, labels=labels).loss
    expected.backward()
    torch.optim.SGD(theirs.parameters(), rate).step()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    after, changed = ours.to_torch().state_dict(), 0
    for key, value in theirs.state_dict().items():
        # The bias of a key shifts all scores of a query equally, so its gradient is only rounding.
        if key.endswith("num_batches_tracked") or ("projection_key" in key and key.endswith(".bias")):
            continue
        change = value - before[key]
        # Keras' moving variance is smaller by 1/n for n tokens of a batch. Here n is 16.
        tolerance = 1 / 16 if key.endswith("running_var") else 1e-3
        scale = float(change.abs().max())
        changed += scale > 1e-4
        difference = float((after[key] - value).abs().max())
        assert difference < tolerance * scale + 1e-6, (key, difference, scale)
    assert changed > 180  # all weights except the convolution of the last query, which a class token bypasses


@pytest.mark.parametrize("field", ["drop_rate", "attention_drop_rate", "drop_path_rate", None])
@torch.no_grad()
def test_each_dropout_rate_acts_only_in_training(field: str | None) -> None:
    keras.utils.set_random_seed(0)
    rates = {name: [0.0] * 3 for name in ("drop_rate", "attention_drop_rate", "drop_path_rate")}
    ours, theirs = twins(**TINY, **rates | ({field: [0.5] * 3} if field else {}))
    pixels = images(4, 3, 32, 32)
    expected = theirs(pixels).logits
    assert_close(ours(pixels).logits, expected, **CLOSE)
    one, other = (ours(pixels, training=True).logits for _ in range(2))
    assert bool((one == other).all()) is (field is None)
    assert not torch.allclose(ours(pixels).logits, expected, rtol=1e-2)  # batch norm has new statistics


@torch.no_grad()
def test_drop_path_drops_whole_samples_and_keeps_expected_value() -> None:
    keras.utils.set_random_seed(0)
    path, ones = CvtLayer(CvtConfig(**TINY), 0, 0.25).drop_path, torch.ones(4000, 3, 2)
    dropped = path(ones, training=True)
    values = [sample.unique().tolist() for sample in dropped]
    assert all(len(sample_values) == 1 for sample_values in values)
    assert sorted({sample_values[0] for sample_values in values}) == pytest.approx([0, 4 / 3])
    assert float(dropped.mean()) == pytest.approx(1, abs=0.05)
    assert_close(path(ones), ones, rtol=0, atol=0)


def test_drop_path_rates_rise_over_the_layers_of_a_stage() -> None:
    model = TFCvtModel(
        CvtConfig(depth=[1, 2, 5], embed_dim=[8, 8, 8], num_heads=[1] * 3, drop_path_rate=[0.3, 0.2, 0.1])
    )
    rates = [[block.drop_path.rate for block in stage.blocks] for stage in model.stages]
    assert rates == [[0], [0, 0.2], pytest.approx([0, 0.025, 0.05, 0.075, 0.1])]


@pytest.mark.slow
@pytest.mark.parametrize("loss", [None, "sparse_categorical_crossentropy"])
def test_fit_reduces_the_loss_and_evaluate_reports_it(loss: str | None) -> None:
    keras.utils.set_random_seed(0)
    rates = {"drop_rate": [0.05] * 3, "attention_drop_rate": [0.05] * 3, "drop_path_rate": [0.05] * 3}
    model = TFCvtForImageClassification(CvtConfig(**TINY, **rates, num_labels=3))
    pixels, labels = classes_to_learn(24)
    given = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if loss else None
    model.compile(keras.optimizers.Adam(2e-3), loss=given, metrics=["accuracy"])
    losses = model.fit(pixels, labels, batch_size=8, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    metrics = model.evaluate(pixels, labels, batch_size=8, verbose=0, return_dict=True)
    predicted = model.predict({"pixel_values": pixels}, batch_size=10, verbose=0)
    assert predicted.logits.shape == (24, 3)
    assert_close(predicted["logits"], model(pixels).logits.detach().numpy(), **CLOSE)
    assert metrics["accuracy"] == pytest.approx((predicted.logits.argmax(-1) == labels).mean())
    assert metrics["loss"] == pytest.approx(float(model(pixels, labels=labels).loss.detach()), rel=1e-4)


def test_sample_weights_scale_the_loss() -> None:
    model, _ = twins(**TINY)
    model.compile(keras.optimizers.SGD(0.0))
    pixels, labels = images(2, 3, 32, 32).numpy(), np.array([3, 7])
    first = model(pixels[:1], labels=labels[:1]).loss.detach()
    weighted = model.evaluate(pixels, labels, sample_weight=np.array([2.0, 0.0]), verbose=0)
    assert weighted == pytest.approx(float(first), rel=1e-4)


def test_initial_weights_have_the_configured_deviation() -> None:
    model = TFCvtForImageClassification(CvtConfig(**TINY, initializer_range=0.1)).to_torch()
    state = model.state_dict()
    drawn = [
        key
        for key, value in state.items()
        if key.endswith("cls_token") or (value.ndim > 1 and key.endswith("weight"))
    ]
    assert len(drawn) > 50
    for key in drawn:
        # A normal distribution truncated at two deviations has 0.88 times the deviation.
        assert float(state[key].std()) == pytest.approx(
            0.088, abs=5 * 0.088 / (2 * state[key].numel()) ** 0.5
        )
    attention = model.cvt.encoder.stages[0].layers[0].attention["attention"]
    assert not torch.equal(attention.projection_query.weight, attention.projection_key.weight)
    others = {key: value for key, value in state.items() if key not in drawn}
    for key, value in others.items():
        assert bool((value == float(key.endswith((".weight", "running_var")))).all()), key


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for key, value in one.state_dict().items():
        assert_close(value, other.state_dict()[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize(
    "fields", [{}, {"qkv_projection_method": ["dw_bn", "linear", "dw_bn"]}, {"num_labels": 0}]
)
def test_weights_survive_conversion_to_pytorch_and_back(fields: dict[str, Any]) -> None:
    ours, theirs = twins(**TINY | fields)
    back = ours.to_torch()
    assert type(back) is CvtForImageClassification
    assert not back.training
    assert_same_weights(back, theirs)
    assert back.config is not ours.config
    features = TFCvtModel.from_torch(theirs.cvt).to_torch()
    assert type(features) is CvtModel
    assert_same_weights(features, theirs.cvt)


def test_model_of_transformers_is_converted() -> None:
    theirs = randomize(transformers.CvtForImageClassification(transformers.CvtConfig(**TINY, num_labels=4)))
    ours = TFCvtForImageClassification.from_torch(theirs.bfloat16())
    assert_same_weights(ours.to_torch(), theirs.float())


def test_other_model_class_fails() -> None:
    features = CvtModel(CvtConfig(**TINY))
    with pytest.raises(CheckpointError, match=r"missing: classifier\.bias, .*; unexpected: encoder\."):
        TFCvtForImageClassification.from_torch(features)
    with pytest.raises(CheckpointError, match=r"unexpected: classifier\.bias"):
        TFCvtModel.from_torch(CvtForImageClassification(CvtConfig(**TINY)))


@pytest.mark.slow
def test_saved_models_load_here_and_in_pytorch(tmp_path: Path) -> None:
    ours, theirs = twins(**TINY, id2label={0: "cat", 1: "dog", 2: "eel"}, num_labels=3)
    ours.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    reloaded = TFCvtForImageClassification.from_pretrained(tmp_path / "model")
    assert_same_weights(reloaded.to_torch(), theirs)
    assert reloaded.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert reloaded.config.architectures == ["CvtForImageClassification"]
    assert_same_weights(CvtForImageClassification.from_pretrained(tmp_path / "model"), theirs)
    features = TFCvtModel.from_pretrained(tmp_path / "model")
    assert_same_weights(features.to_torch(), theirs.cvt)
    features.save_pretrained(tmp_path / "features")
    assert_same_weights(TFCvtModel.from_pretrained(tmp_path / "features").to_torch(), theirs.cvt)


def test_new_head_is_initialized_and_features_are_kept(tmp_path: Path) -> None:
    _, theirs = twins(**TINY)
    TFCvtModel.from_torch(theirs.cvt).save_pretrained(tmp_path)
    model = TFCvtForImageClassification.from_pretrained(tmp_path, num_labels=500).to_torch()
    assert_same_weights(model.cvt, theirs.cvt)
    assert model.classifier.weight.shape == (500, 48)
    assert 0.015 < float(model.classifier.weight.detach().std()) < 0.022


@pytest.mark.parametrize("path", [TF_TINY, TF_TINY / "tf_model.h5"], ids=["folder", "file"])
@torch.inference_mode()
def test_tensorflow_checkpoint_gives_the_tensorflow_outputs(path: Path) -> None:
    model = TFCvtForImageClassification.from_pretrained(path)
    expected = np.load(TF_TINY / "outputs.npz")
    actual = model(expected["pixel_values"], labels=expected["labels"], output_hidden_states=True)
    assert_close(actual.logits.numpy(), expected["logits"], **CLOSE)
    assert_close(actual.hidden_states[-1].numpy(), expected["last_hidden_state"], **CLOSE)
    assert float(actual.loss) == pytest.approx(expected["losses"].mean(), rel=1e-5)
    assert model.config.id2label[2] == "cat"


@torch.inference_mode()
def test_bundled_checkpoint_gives_the_logits_of_pytorch() -> None:
    folder = BUNDLED["fashion-mnist"]
    pixels = images(2, 3, 64, 64)
    expected = CvtForImageClassification.from_pretrained(folder)(pixels).logits
    assert_close(TFCvtForImageClassification.from_pretrained(folder)(pixels).logits, expected, **CLOSE)


@pytest.mark.slow
def test_pytorch_weights_take_precedence_over_tensorflow(tmp_path: Path) -> None:
    model = TFCvtForImageClassification(CvtConfig.from_pretrained(TF_TINY))
    model.save_pretrained(tmp_path)
    shutil.copy(TF_TINY / "tf_model.h5", tmp_path)
    assert_same_weights(TFCvtForImageClassification.from_pretrained(tmp_path).to_torch(), model.to_torch())
    at_h5 = TFCvtForImageClassification.from_pretrained(tmp_path / "tf_model.h5").to_torch()
    assert_same_weights(at_h5, TFCvtForImageClassification.from_pretrained(TF_TINY).to_torch())


def test_features_of_tensorflow_classifier_are_read() -> None:
    features = TFCvtModel.from_pretrained(TF_TINY).to_torch()
    assert_same_weights(features, TFCvtForImageClassification.from_pretrained(TF_TINY).to_torch().cvt)


def test_folder_without_model_fails(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no file named"):
        TFCvtForImageClassification.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_the_configuration_are_named() -> None:
    with pytest.raises(
        CheckpointError, match=r"tf_model\.h5: .*wrong shape: classifier\.bias, classifier\.weight$"
    ):
        TFCvtForImageClassification.from_pretrained(TF_TINY, num_labels=7)
    with pytest.raises(CheckpointError, match=r"missing: cvt\.encoder\.stages\.2\.layers\.3\."):
        TFCvtForImageClassification.from_pretrained(TF_TINY, depth=[1, 2, 4])
    with pytest.raises(CheckpointError, match=r"unexpected: cvt\.encoder\.stages\.2\.cls_token$"):
        TFCvtModel.from_pretrained(TF_TINY, cls_token=[False] * 3)


@torch.inference_mode()
def test_keras_format_keeps_configuration_and_weights(tmp_path: Path) -> None:
    ours, theirs = twins(**TINY, id2label={0: "cat", 1: "dog", 2: "eel"}, num_labels=3)
    ours.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(reloaded) is TFCvtForImageClassification
    assert reloaded.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert_same_weights(reloaded.to_torch(), theirs)


@torch.inference_mode()
def test_models_can_be_part_of_functional_models() -> None:
    ours, theirs = twins(**TINY, qkv_projection_method=["dw_bn", "linear", "dw_bn"])
    inputs = keras.Input((3, None, None), name="images")
    outputs = ours.cvt(inputs, output_hidden_states=True)
    pooled = keras.layers.GlobalAveragePooling2D(data_format="channels_first")(outputs.last_hidden_state)
    model = keras.Model({"images": inputs}, [pooled, outputs.hidden_states[0], ours(inputs).logits])
    pixels = images(2, 3, 64, 64)
    actual = model({"images": pixels})
    expected = theirs(pixels, output_hidden_states=True)
    assert_close(actual[0], expected.hidden_states[-1].mean((2, 3)), **CLOSE)
    assert_close(actual[1], expected.hidden_states[0], **CLOSE)
    assert_close(actual[2], expected.logits, **CLOSE)


def test_average_pooling_fails() -> None:
    with pytest.raises(ValueError, match="does not support qkv_projection_method 'avg'"):
        TFCvtModel(CvtConfig(**TINY, qkv_projection_method=["dw_bn", "avg", "dw_bn"]))


def test_configuration_changed_to_invalid_fails() -> None:
    config = CvtConfig(**TINY)
    config.depth = [1, 2]
    with pytest.raises(ValueError, match="depth has 2 entries"):
        TFCvtForImageClassification(config)


IMPORTS = """
import os, sys
import cvt
cvt.CvtModel, cvt.Engine
print(sorted({"keras", "h5py"} & set(sys.modules)))

def attempt(module, without):
    sys.modules[without] = None
    try:
        __import__(module)
    except ImportError as error:
        print(error)
    del sys.modules[without]

attempt("cvt.keras", without="keras")
attempt("cvt.checkpoints.tensorflow", without="h5py")
os.environ["KERAS_BACKEND"] = "tensorflow"
attempt("cvt.keras", without="tensorflow")
"""


@pytest.mark.slow
def test_keras_is_imported_on_demand_and_missing_packages_are_named() -> None:
    """Runs in a new process, because the code changes `sys.modules`."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_itself, without_keras, without_h5py, without_backend = done.stdout.splitlines()
    assert by_itself == "[]"
    assert without_keras == "cvt.keras needs Keras: pip install 'cvt-label[keras]'"
    assert without_h5py == "reading tf_model.h5 needs h5py: pip install 'cvt-label[keras]'"
    assert without_backend.endswith("set KERAS_BACKEND=torch to use PyTorch")
