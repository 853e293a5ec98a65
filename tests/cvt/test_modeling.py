"""Tests of the PyTorch model against transformers' CvT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from cvt.checkpoints import BUNDLED, load_checkpoint
from cvt.modeling import CvtConfig, CvtForImageClassification, CvtModel
from cvt.network import CvtDropPath
from tests.cvt.random_models import FOUR_STAGES, PUBLISHED, TINY, randomize

#: cvt-w24 has 277 million parameters. The tests use its widths and heads with the smallest depth that works.
SHAPES = PUBLISHED | {"cvt-w24": PUBLISHED["cvt-w24"] | {"depth": [2, 2, 3]}}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


Twins = tuple[CvtForImageClassification, transformers.CvtForImageClassification]


def twins(**fields: Any) -> Twins:
    """Returns this model and transformers' model, with the same random weights."""
    fields = {"num_labels": 10} | fields
    with torch.device("meta"):  # skips random initialization
        theirs = transformers.CvtForImageClassification(transformers.CvtConfig(**fields))
        ours = CvtForImageClassification(CvtConfig(**fields))
    theirs = randomize(theirs.to_empty(device="cpu"))
    ours.to_empty(device="cpu").load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval(), theirs


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=SHAPES)
def published(request: pytest.FixtureRequest) -> Twins:
    return twins(**SHAPES[request.param])


@pytest.mark.parametrize("size", [224, pytest.param(384, marks=pytest.mark.slow)])
@torch.inference_mode()
def test_logits_and_hidden_states_equal_transformers(published: Twins, size: int) -> None:
    ours, theirs = published
    pixels = images(1, 3, size, size)
    one, other = (model(pixels, output_hidden_states=True) for model in (ours, theirs))
    assert other.logits.std() > 0.1
    assert_close(one.logits, other.logits, **CLOSE)
    assert len(one.hidden_states) == 3
    for mine, expected in zip(one.hidden_states, other.hidden_states, strict=True):
        assert_close(mine, expected, **CLOSE)


@torch.inference_mode()
def test_features_of_any_image_shape_equal_transformers() -> None:
    ours, theirs = twins(**TINY)
    pixels = images(2, 3, 70, 101)
    one, other = ours.cvt(pixels), theirs.cvt(pixels)
    assert_close(one.last_hidden_state, other.last_hidden_state, **CLOSE)
    assert_close(one.cls_token_value, other.cls_token_value, **CLOSE)
    assert one.hidden_states is None


@pytest.mark.parametrize(
    "fields",
    [
        {"qkv_bias": [False, True, False]},
        {"kernel_qkv": [5, 3, 1], "padding_q": [2, 1, 0], "padding_kv": [0, 1, 0], "stride_kv": [3, 1, 2]},
        {"mlp_ratio": [2.5, 1.0, 3.0]},
        {"patch_sizes": [4, 2, 3], "patch_stride": [4, 2, 1], "patch_padding": [0, 0, 1]},
        {"num_channels": 1},
        {"drop_rate": [0.5] * 3, "attention_drop_rate": [0.5] * 3, "drop_path_rate": [0.5] * 3},
    ],
    ids=lambda fields: ", ".join(fields),
)
@torch.inference_mode()
def test_each_configuration_field_acts_as_in_transformers(fields: dict[str, Any]) -> None:
    ours, theirs = twins(**TINY | fields)
    pixels = images(2, fields.get("num_channels", 3), 64, 64)
    assert_close(ours(pixels).logits, theirs(pixels).logits, **CLOSE)


@torch.inference_mode()
def test_model_with_four_stages_equals_transformers() -> None:
    ours, theirs = twins(**FOUR_STAGES)
    pixels = images(2, 3, 64, 64)
    assert_close(ours(pixels).logits, theirs(pixels).logits, **CLOSE)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_and_buffers_have_the_order_of_transformers(name: str) -> None:
    with torch.device("meta"):
        ours = CvtForImageClassification(CvtConfig(**SHAPES[name]))
        theirs = transformers.CvtForImageClassification(transformers.CvtConfig(**SHAPES[name]))
    for list_tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
        shapes = [[(key, tensor.shape) for key, tensor in list_tensors(model)] for model in (ours, theirs)]
        assert shapes[0] == shapes[1]


def test_weights_load_strictly_into_transformers() -> None:
    ours = randomize(CvtForImageClassification(CvtConfig(**TINY)))
    theirs = transformers.CvtForImageClassification(transformers.CvtConfig(**TINY)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    pixels = images(2, 3, 64, 64)
    assert_close(ours(pixels).logits, theirs(pixels).logits, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "training"), [(64, False), (64, True), (96, False)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_equal_those_of_transformers(name: str, size: int, training: bool) -> None:
    """In training, the statistics of batch norm are equal too.

    The batch has two images, because the gradient of transformers' model is wrong for a single image.
    """
    ours, theirs = twins(**SHAPES[name], drop_path_rate=[0.0, 0.0, 0.0])
    pixels, labels = images(2, 3, size, size).requires_grad_(), torch.tensor([3, 7])
    found = []
    for model in (ours, theirs):
        output = model.train(training)(pixels, labels=labels)
        output.loss.backward()
        gradients = {key: value.grad for key, value in model.named_parameters()}
        found.append((output.loss.detach(), pixels.grad, gradients, dict(model.named_buffers())))
        pixels.grad = None
    (loss, grad, gradients, buffers), (their_loss, their_grad, their_gradients, their_buffers) = found
    assert_close(loss, their_loss, **CLOSE)
    assert_close(grad, their_grad, rtol=1e-4, atol=1e-5 * float(their_grad.abs().max()))
    assert gradients.keys() == their_gradients.keys()
    # The bias of a key shifts all scores of a query equally, so its gradient is only rounding. The tolerance
    # is therefore relative to the largest gradient of all weights.
    scale = max(float(g.abs().max()) for g in their_gradients.values())
    for key, expected in their_gradients.items():
        assert_close(gradients[key], expected, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, k=key: f"{k}: {m}")
    for key, expected in their_buffers.items():
        assert_close(buffers[key], expected, **CLOSE)


@torch.inference_mode()
def test_model_without_class_token_classifies_the_mean_of_tokens() -> None:
    ours, theirs = twins(**TINY, cls_token=[False] * 3)
    pixels = images(2, 3, 64, 64)
    expected = theirs(
        pixels, output_hidden_states=True
    ).logits  # transformers raises IndexError without hidden states
    assert_close(ours(pixels).logits, expected, **CLOSE)
    assert_close(ours(pixels, return_dict=False)[0], expected, **CLOSE)
    assert ours.cvt(pixels).cls_token_value is None


@torch.inference_mode()
def test_class_tokens_of_earlier_stages_act_as_in_transformers() -> None:
    fields = {"embed_dim": [48, 48, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}
    ours, theirs = twins(**fields, cls_token=[True, False, True])
    pixels = images(2, 3, 64, 64)
    assert_close(ours(pixels).logits, theirs(pixels).logits, **CLOSE)


def naive_attention(module: nn.Module, method: str, hidden: Tensor, height: int, width: int) -> Tensor:
    """Computes attention from the equations, head by head, for a projection without weights.

    Average pooling is that of the paper's code: kernel 3, stride 2, zero padding of 1, and one more window if
    tokens remain after the last one (ceil_mode).
    """
    weights = module.state_dict()
    cls_token, tokens = hidden[:, : -height * width], hidden[:, -height * width :]
    pooled = tokens
    if method == "avg":
        grid = tokens.reshape(len(tokens), height, width, -1)
        windows = []
        for y in range(-1, height, 2):
            for x in range(-1, width, 2):
                if y + 3 > height + 2 or x + 3 > width + 2:
                    continue
                inside = grid[:, max(y, 0) : y + 3, max(x, 0) : x + 3].sum(dim=(1, 2))
                counted = (min(y + 3, height + 1) - y) * (min(x + 3, width + 1) - x)
                windows.append(inside / counted)
        pooled = torch.stack(windows, dim=1)

    def linear(name: str, value: Tensor) -> Tensor:
        value = torch.cat([cls_token, value], dim=1)
        return value @ weights[f"projection_{name}.weight"].T + weights[f"projection_{name}.bias"]

    query, key, value = linear("query", tokens), linear("key", pooled), linear("value", pooled)
    channels = hidden.shape[-1]
    heads = []
    for part in torch.arange(channels).chunk(module.num_heads):
        scores = query[..., part] @ key[..., part].transpose(1, 2) / channels**0.5
        heads.append(scores.softmax(dim=-1) @ value[..., part])
    return torch.cat(heads, dim=-1)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (7, 5), (6, 9)])
@pytest.mark.parametrize("method", ["avg", "linear"])
@torch.inference_mode()
def test_avg_and_linear_projections_equal_a_naive_reference(method: str, height: int, width: int) -> None:
    model = randomize(CvtModel(CvtConfig(**TINY, qkv_projection_method=[method] * 3)))
    for stage, class_tokens in ((1, 0), (2, 1)):
        module = model.encoder.stages[stage].layers[0].attention["attention"]
        hidden = images(2, height * width + class_tokens, TINY["embed_dim"][stage])
        expected = naive_attention(module, method, hidden, height, width)
        assert_close(module(hidden, height, width), expected, **CLOSE)


def test_saved_model_keeps_different_projections_per_stage(tmp_path: Path) -> None:
    config = CvtConfig(**TINY, qkv_projection_method=["avg", "linear", "dw_bn"], num_labels=4)
    model = randomize(CvtForImageClassification(config))
    assert [
        key for key in model.state_dict() if "convolution_projection" in key and "stages.2" not in key
    ] == []
    model.save_pretrained(tmp_path)
    reloaded = CvtForImageClassification.from_pretrained(tmp_path)
    pixels = images(2, 3, 70, 70)
    assert_close(reloaded(pixels).logits, model(pixels).logits, rtol=0, atol=0)


def test_saved_checkpoint_loads_in_transformers(tmp_path: Path) -> None:
    ours = randomize(CvtForImageClassification(CvtConfig(**TINY, id2label={0: "cat", 1: "dog", 2: "eel"})))
    ours.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(theirs) is transformers.CvtForImageClassification
    assert not any(info.values())
    assert theirs.config.architectures == ["CvtForImageClassification"]
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    pixels = images(2, 3, 64, 64)
    assert_close(theirs(pixels).logits, ours(pixels).logits, **CLOSE)


def test_checkpoint_saved_by_transformers_loads(tmp_path: Path) -> None:
    theirs = randomize(transformers.CvtForImageClassification(transformers.CvtConfig(**TINY, num_labels=3)))
    theirs.save_pretrained(tmp_path)
    ours, info = CvtForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(ours.config, CvtConfig)
    assert not any(info.values())
    assert not ours.training
    pixels = images(2, 3, 64, 64)
    assert_close(ours(pixels).logits, theirs(pixels).logits, **CLOSE)


def test_new_head_is_initialized_and_features_are_kept(tmp_path: Path) -> None:
    features = randomize(CvtModel(CvtConfig(**TINY)))
    features.save_pretrained(tmp_path)
    model = CvtForImageClassification.from_pretrained(tmp_path, num_labels=500)
    for key, expected in features.state_dict().items():
        assert_close(model.cvt.state_dict()[key], expected, rtol=0, atol=0)
    assert float(model.classifier.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not model.classifier.bias.any()
    assert (model.layernorm.weight == 1).all()


def test_weights_are_initialized_as_in_transformers() -> None:
    fields = TINY | {"initializer_range": 0.1}
    ours = CvtForImageClassification(CvtConfig(**fields)).state_dict()
    theirs = transformers.CvtForImageClassification(transformers.CvtConfig(**fields)).state_dict()
    for key, expected in theirs.items():
        if expected.is_floating_point() and expected.std(correction=0) > 0:
            n = expected.numel()
            assert float(ours[key].std()) == pytest.approx(0.1, abs=5 * 0.1 / (2 * n) ** 0.5), key
            assert abs(float(ours[key].mean())) < 5 * 0.1 / n**0.5, key
        else:
            assert_close(ours[key], expected, rtol=0, atol=0, msg=key)


AUTO = """
import json, sys, transformers
if sys.argv[3:]:
    from cvt.modeling import register
    register()
    register()
classifier = transformers.pipeline("image-classification", model=sys.argv[1])
loaded = transformers.AutoModel, transformers.AutoModelForImageClassification
models = [auto.from_pretrained(sys.argv[1]) for auto in loaded] + [classifier.model]
scores = {found["label"]: found["score"] for found in classifier(sys.argv[2], top_k=10)}
print(json.dumps([[f"{type(model).__module__}.{type(model).__name__}" for model in models], scores]))
"""


@pytest.mark.slow
def test_auto_classes_and_pipelines_load_the_bundled_checkpoint(
    tmp_path: Path,
) -> None:
    """Runs in two processes: one without this package, and one that calls `register`."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    folder = BUNDLED["fashion-mnist"]
    found = []
    for register in ([], ["register"]):
        command = [sys.executable, "-c", AUTO, str(folder), str(tmp_path / "image.png"), *register]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (plain, their_scores), (registered, our_scores) = found
    names = ["CvtModel", "CvtForImageClassification", "CvtForImageClassification"]
    assert plain == [f"transformers.models.cvt.modeling_cvt.{name}" for name in names]
    assert registered == [f"cvt.modeling.{name}" for name in names]

    checkpoint = load_checkpoint("fashion-mnist")
    preprocessor = checkpoint.preprocessor
    pixels = torch.from_numpy(preprocessor(image)) * preprocessor.rescale_factor
    pixels = (pixels - torch.tensor(preprocessor.mean)) / torch.tensor(preprocessor.std)
    probabilities = checkpoint.model(pixels.float().permute(2, 0, 1)[None]).softmax(dim=1)[0].tolist()
    expected = dict(zip(checkpoint.labels, probabilities, strict=True))
    assert our_scores == pytest.approx(their_scores, abs=1e-5)
    assert our_scores == pytest.approx(expected, abs=1e-3)  # pixels differ by rounding


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("labeled", [False, True])
@torch.inference_mode()
def test_output_tuples_equal_transformers(hidden: bool, labeled: bool) -> None:
    ours, theirs = twins(**TINY)
    pixels, labels = images(2, 3, 64, 64), torch.tensor([1, 2]) if labeled else None
    arguments: dict[str, Any] = {"output_hidden_states": hidden, "return_dict": False}
    assert_close(ours(pixels, labels, **arguments), theirs(pixels, labels, **arguments), **CLOSE)
    assert_close(ours.cvt(pixels, **arguments), theirs.cvt(pixels, **arguments), **CLOSE)


@torch.inference_mode()
def test_configuration_sets_default_outputs() -> None:
    model = randomize(CvtForImageClassification(CvtConfig(**TINY, output_hidden_states=True)))
    pixels = images(1, 3, 64, 64)
    assert [tuple(state.shape) for state in model(pixels).hidden_states] == [
        (1, 16, 16, 16),
        (1, 32, 8, 8),
        (1, 48, 4, 4),
    ]
    assert model(pixels, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert isinstance(model(pixels), tuple)
    assert isinstance(model.cvt(pixels), tuple)


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [
        (10, torch.tensor([3, 7])),
        (1, torch.tensor([[0.5], [-2.0]])),
        (4, torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]])),
    ],
    ids=["single label", "regression", "multi-label"],
)
def test_losses_equal_transformers(num_labels: int, labels: Tensor) -> None:
    ours, theirs = twins(**TINY, num_labels=num_labels)
    pixels = images(2, 3, 64, 64)
    assert_close(ours(pixels, labels=labels).loss, theirs(pixels, labels=labels).loss, **CLOSE)
    assert ours.config.problem_type == theirs.config.problem_type


def test_loss_is_divided_by_num_items_in_batch() -> None:
    """transformers' Trainer needs this to accumulate gradients."""
    model = randomize(CvtForImageClassification(CvtConfig(**TINY, num_labels=10)))
    pixels, labels = images(2, 3, 64, 64), torch.tensor([3, 7])
    whole = model(pixels, labels=labels).loss
    assert_close(model(pixels, labels=labels, num_items_in_batch=8).loss, whole * 2 / 8)


def test_model_without_labels_has_no_classifier() -> None:
    model = randomize(CvtForImageClassification(CvtConfig(**TINY, num_labels=0)))
    assert model(images(2, 3, 64, 64)).logits.shape == (2, 48)


def test_call_without_images_fails() -> None:
    with pytest.raises(ValueError, match="You have to specify pixel_values"):
        CvtModel(CvtConfig(**TINY))()


def test_configuration_changed_to_invalid_fails() -> None:
    config = CvtConfig(**TINY)
    config.depth = [1, 2]
    with pytest.raises(ValueError, match="depth has 2 entries"):
        CvtForImageClassification(config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_half_precision_is_close_to_float32(dtype: torch.dtype) -> None:
    model = randomize(CvtForImageClassification(CvtConfig(**TINY)))
    pixels = images(2, 3, 32, 32)
    expected = model(pixels).logits
    actual = model.to(dtype)(pixels.to(dtype)).logits
    assert actual.dtype == dtype
    assert_close(actual.float(), expected, rtol=0.1, atol=0.1)


@torch.inference_mode()
def test_saved_model_in_half_precision_loads_unchanged(tmp_path: Path) -> None:
    model = randomize(CvtForImageClassification(CvtConfig(**TINY))).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    reloaded = CvtForImageClassification.from_pretrained(tmp_path)
    assert reloaded.dtype == torch.bfloat16
    pixels = images(2, 3, 32, 32).to(torch.bfloat16)
    assert_close(reloaded(pixels).logits, model(pixels).logits, rtol=0, atol=0)


# transformers 5.0 renamed the methods.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_gradients_and_statistics(reentrant: bool) -> None:
    """Checkpointing computes layers twice, but batch norm must update its statistics once."""
    pixels, labels = images(2, 3, 64, 64), torch.tensor([0, 1])
    found, calls = [], []
    for checkpointing in (False, True):
        model = randomize(CvtForImageClassification(CvtConfig(**TINY, drop_rate=[0.5] * 3))).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        layer = model.cvt.encoder.stages[1].layers[0]
        layer.intermediate.register_forward_hook(lambda *_, at=checkpointing: calls.append(at))
        torch.manual_seed(0)  # dropout is the same when a layer is computed a second time
        model(pixels, labels=labels).loss.backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        found.append((gradients, dict(model.named_buffers())))
    assert calls == [False, True, True]
    (gradients, buffers), (our_gradients, our_buffers) = found
    assert_close(our_gradients, gradients, rtol=0, atol=0)
    moved = {key: value for key, value in buffers.items() if value.is_floating_point()}
    assert_close({key: our_buffers[key] for key in moved}, moved, **CLOSE)

    model.gradient_checkpointing_disable()
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}


@pytest.mark.slow
@torch.inference_mode()
def test_exported_model_supports_any_batch_size() -> None:
    model = randomize(CvtForImageClassification(CvtConfig(**TINY)))
    shapes = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(model, (images(2, 3, 64, 64),), dynamic_shapes=shapes).module()
    for count in (1, 5):
        pixels = images(count, 3, 64, 64)
        assert_close(exported(pixels).logits, model(pixels).logits, **CLOSE)


def test_channels_last_images_give_the_same_logits() -> None:
    model = randomize(CvtForImageClassification(CvtConfig(**TINY)))
    pixels = images(2, 3, 64, 64)
    other = pixels.contiguous(memory_format=torch.channels_last)
    assert_close(model(other).logits, model(pixels).logits, **CLOSE)


def test_drop_path_drops_whole_samples_and_keeps_expected_value() -> None:
    torch.manual_seed(0)
    path, ones = CvtDropPath(0.25), torch.ones(4000, 3, 2)
    dropped = path.train()(ones)
    values = [sample.unique().tolist() for sample in dropped]
    assert all(len(sample_values) == 1 for sample_values in values)
    assert sorted({sample_values[0] for sample_values in values}) == pytest.approx([0, 4 / 3])
    assert float(dropped.mean()) == pytest.approx(1, abs=0.05)
    assert path.eval()(ones) is ones


def test_layer_with_dropped_paths_returns_its_input() -> None:
    torch.manual_seed(0)
    model = CvtModel(CvtConfig(**TINY, drop_path_rate=[0.0, 0.0, 0.999999])).train()
    layer = model.encoder.stages[2].layers[-1]
    hidden = images(2, 17, 48)
    assert_close(layer(hidden, 4, 4), hidden, rtol=0, atol=0)


def test_drop_path_rates_rise_over_the_layers_of_a_stage() -> None:
    model = CvtModel(
        CvtConfig(depth=[1, 2, 5], embed_dim=[8, 8, 8], num_heads=[1] * 3, drop_path_rate=[0.3, 0.2, 0.1])
    )
    rates = [[layer.drop_path.rate for layer in stage.layers] for stage in model.encoder.stages]
    assert rates == [[0], [0, 0.2], pytest.approx([0, 0.025, 0.05, 0.075, 0.1])]
