"""Tests of the engine: results, arguments, errors and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cvt.inference.engine import Engine
from cvt.inference.network import Result, Runtime
from cvt.modeling import CvtConfig, CvtForImageClassification
from cvt.preprocessing import Preprocessor
from cvt.runtimes import resolve_precision
from tests.cvt.inference.small import (
    IMAGES,
    MEAN,
    STD,
    assert_equals_model,
    make_engine,
    make_model,
    model_outputs,
)
from tests.cvt.random_models import randomize


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("method", ["dw_bn", "avg", "linear"])
def test_engine_equals_the_model(method: str, cls_token: bool) -> None:
    model = make_model(qkv_projection_method=[method] * 3, cls_token=[False, False, cls_token])
    assert_equals_model(make_engine(model), model)


def test_engine_equals_the_model_for_cvt_13() -> None:
    model = randomize(CvtForImageClassification(CvtConfig(num_labels=1000)))
    preprocessor = Preprocessor(224, crop_pct=0.875, resample=3, mean=MEAN, std=STD, rescale_factor=1 / 255)
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    logits, embeddings = model_outputs(model, images)
    output = Engine(model, preprocessor, device="cpu")(images)
    np.testing.assert_allclose(output.logits, logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(output.embeddings, embeddings, atol=1e-4, rtol=0)


def test_engine_copies_the_model() -> None:
    model = make_model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    engine = make_engine(model)
    output = engine(IMAGES)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.nn.init.zeros_(model.classifier.weight)
    np.testing.assert_array_equal(engine(IMAGES).logits, output.logits)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_results_do_not_depend_on_the_batch(batch_size: int) -> None:
    whole = make_engine(batch_size=64)(IMAGES)
    split = make_engine(batch_size=batch_size)(IMAGES[::-1])
    np.testing.assert_allclose(split.logits[::-1], whole.logits, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(split.embeddings[::-1], whole.embeddings, atol=1e-5, rtol=1e-5)


def test_engine_is_deterministic() -> None:
    model = make_model()
    first, second = make_engine(model), make_engine(model)
    result, repeated, other = first(IMAGES), first(IMAGES), second(IMAGES)
    for output in (repeated, other):
        np.testing.assert_array_equal(output.logits, result.logits)
        np.testing.assert_array_equal(output.embeddings, result.embeddings)


def test_next_call_does_not_overwrite_outputs() -> None:
    engine = make_engine()
    kept = engine(IMAGES)
    copy = kept.logits.copy()
    engine(255 - IMAGES)
    np.testing.assert_array_equal(kept.logits, copy)


def test_read_only_and_strided_arrays_are_accepted() -> None:
    engine = make_engine()
    expected = engine(IMAGES[:, :, ::-1].copy())
    read_only = IMAGES[:, :, ::-1]
    read_only.flags.writeable = False
    np.testing.assert_array_equal(engine(read_only).logits, expected.logits)


def test_tensor_gives_the_same_result_as_array() -> None:
    engine = make_engine(batch_size=3)
    expected, found = engine(IMAGES), engine(torch.tensor(IMAGES))
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.embeddings, expected.embeddings)
    strided = torch.tensor(IMAGES).flip(0)[::2]
    np.testing.assert_array_equal(engine(strided).logits, engine(IMAGES[::-2].copy()).logits)
    assert engine(torch.tensor(IMAGES[:0])).logits.shape == (0, 5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.tensor(IMAGES).float(), r"must be uint8 \(n, 48, 48, 3\), not torch.float32 \(7, 48, 48, 3\)"),
        (torch.tensor(IMAGES).permute(0, 3, 1, 2), r"not torch.uint8 \(7, 3, 48, 48\)"),
    ],
    ids=["floats", "channels first"],
)
def test_invalid_tensors_fail(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine()(images)


def test_concurrent_calls_get_their_own_results() -> None:
    engine = make_engine(batch_size=3)
    inputs = [IMAGES[start:] + np.uint8(start) for start in range(6)] * 4
    outputs = [engine(images) for images in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine, inputs))
    for actual, expected in zip(found, outputs, strict=True):
        np.testing.assert_array_equal(actual.logits, expected.logits)
        np.testing.assert_array_equal(actual.embeddings, expected.embeddings)


def test_no_images_give_empty_outputs() -> None:
    output = make_engine()(IMAGES[:0])
    assert output.logits.shape == (0, 5)
    assert output.embeddings.shape == (0, 48)


def test_logits_without_labels_are_the_embeddings() -> None:
    output = make_engine(make_model(num_labels=0))(IMAGES)
    np.testing.assert_array_equal(output.logits, output.embeddings)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_and_has_no_ties(precision: str) -> None:
    model = make_model(num_labels=1000)
    expected = make_engine(model)(IMAGES[:2])
    actual = make_engine(model, precision=precision)(IMAGES[:2])
    assert actual.logits.dtype == actual.embeddings.dtype == np.float32
    assert not np.array_equal(actual.logits, expected.logits)
    np.testing.assert_allclose(actual.logits, expected.logits, atol=0.2, rtol=0)
    assert all(len(np.unique(row)) > 990 for row in actual.logits)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.astype(np.float32), r"must be uint8 \(n, 48, 48, 3\), not float32 \(7, 48, 48, 3\)"),
        (IMAGES[0], r"must be uint8 \(n, 48, 48, 3\), not uint8 \(48, 48, 3\)"),
        (IMAGES[:, :40], r"must be uint8 \(n, 48, 48, 3\), not uint8 \(7, 40, 48, 3\)"),
        (IMAGES.transpose(0, 3, 1, 2), r"not uint8 \(7, 3, 48, 48\)"),
        (IMAGES[..., :1], r"not uint8 \(7, 48, 48, 1\)"),
    ],
    ids=["floats", "one image", "other size", "channels first", "gray"],
)
def test_invalid_arrays_fail(images: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine()(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, not 'tpu'"),
        ({"precision": "int8"}, "precision must be one of auto, fp32, bf16, fp16, not 'int8'"),
        ({"runtime": "tensorrt"}, "runtime must be one of torch, compile, openvino, not 'tensorrt'"),
        ({"runtime": "compile", "device": "cpu"}, "runtime 'compile' needs device 'cuda', not 'cpu'"),
        ({"batch_size": 0}, "batch_size must be 1 or more, not 0"),
        (
            {"model": make_model(num_channels=1)},
            "num_channels is 1, but the preprocessing has 3",
        ),
    ],
)
def test_invalid_options_fail(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_missing_gpu_fails_unless_device_is_auto() -> None:
    with pytest.raises(ValueError, match="PyTorch finds no GPU"):
        make_engine(device="cuda")
    assert make_engine(device="auto").device.type == "cpu"


class LimitedMemory:
    """A runtime that runs out of memory above a number of images."""

    def __init__(self, runtime: Runtime, max_images: int) -> None:
        self.batch_size = runtime.batch_size
        self.sizes: list[int] = []
        self._runtime = runtime
        self._max_images = max_images

    def __call__(self, images: np.ndarray | Tensor) -> Result:
        self.sizes.append(len(images))
        if len(images) > self._max_images:
            raise torch.OutOfMemoryError("out of memory")
        return self._runtime(images)


def limited_engine(batch_size: int, max_images: int) -> tuple[Engine, LimitedMemory]:
    engine = make_engine(batch_size=batch_size)
    engine._runtime = limited = LimitedMemory(engine._runtime, max_images)
    return engine, limited


def test_out_of_memory_reduces_the_batch_size() -> None:
    expected = make_engine(batch_size=64)(IMAGES)
    engine, device = limited_engine(64, max_images=3)
    found = engine(IMAGES)
    assert engine.batch_size == 2
    assert_close(torch.tensor(found.logits), torch.tensor(expected.logits))
    engine(IMAGES)
    assert device.sizes.count(2) >= len(IMAGES) // 2 * 2
    assert sum(size > 3 for size in device.sizes) <= 5


def test_out_of_memory_for_one_image_fails() -> None:
    engine, _ = limited_engine(4, max_images=0)
    with pytest.raises(torch.OutOfMemoryError):
        engine(IMAGES)


def test_auto_precision_is_fp32_on_cpu_and_bf16_on_gpu() -> None:
    assert make_engine(precision="auto").precision == "fp32"
    assert resolve_precision("auto", "cuda") == "bf16"
    assert resolve_precision("fp16", "cpu") == "fp16"
