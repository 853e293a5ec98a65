from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cvt.configuration import CvtConfig
from cvt.inference import engine as engine_module
from cvt.inference.engine import Engine, engine_thread, make_runtime
from cvt.inference.network import Result, Runtime
from cvt.modeling import CvtForImageClassification
from cvt.preprocessing import Preprocessor
from cvt.runtimes import resolve_precision
from tests.cvt.inference.small import (
    IMAGES,
    MEAN,
    STD,
    make_engine,
    make_model,
    outputs_of_the_model,
    same_as_the_model,
)
from tests.cvt.random_models import randomize


def with_runtime(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Runtime], Runtime]) -> None:
    """From now on, engines have the runtime that `wrap` makes of theirs."""
    monkeypatch.setattr(engine_module, "make_runtime", lambda *arguments: wrap(make_runtime(*arguments)))


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("method", ["dw_bn", "avg", "linear"])
def test_it_gives_what_the_model_gives(method: str, cls_token: bool) -> None:
    model = make_model(qkv_projection_method=[method] * 3, cls_token=[False, False, cls_token])
    same_as_the_model(make_engine(model), model)


def test_it_gives_what_the_model_gives_at_the_size_of_cvt_13() -> None:
    model = randomize(CvtForImageClassification(CvtConfig(num_labels=1000)))
    preprocessor = Preprocessor(224, crop_pct=0.875, resample=3, mean=MEAN, std=STD, rescale_factor=1 / 255)
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    logits, embeddings = outputs_of_the_model(model, images)
    output = Engine(model, preprocessor, device="cpu")(images)
    np.testing.assert_allclose(output.logits, logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(output.embeddings, embeddings, atol=1e-4, rtol=0)


def test_the_model_stays_as_it_is_and_later_changes_of_it_have_no_effect() -> None:
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
def test_results_do_not_depend_on_the_company_of_an_image(batch_size: int) -> None:
    together = make_engine(batch_size=64)(IMAGES)
    apart = make_engine(batch_size=batch_size)(IMAGES[::-1])
    np.testing.assert_allclose(apart.logits[::-1], together.logits, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(apart.embeddings[::-1], together.embeddings, atol=1e-5, rtol=1e-5)


def test_it_is_deterministic() -> None:
    model = make_model()
    first, second = make_engine(model), make_engine(model)
    once, again, other = first(IMAGES), first(IMAGES), second(IMAGES)
    for output in (again, other):
        np.testing.assert_array_equal(output.logits, once.logits)
        np.testing.assert_array_equal(output.embeddings, once.embeddings)


def test_outputs_of_one_call_are_not_overwritten_by_the_next() -> None:
    engine = make_engine()
    kept = engine(IMAGES)
    copy = kept.logits.copy()
    engine(255 - IMAGES)
    np.testing.assert_array_equal(kept.logits, copy)


def test_read_only_and_strided_arrays_are_taken() -> None:
    engine = make_engine()
    wanted = engine(IMAGES[:, :, ::-1].copy())
    frozen = IMAGES[:, :, ::-1]
    frozen.flags.writeable = False
    np.testing.assert_array_equal(engine(frozen).logits, wanted.logits)


def test_a_tensor_on_the_device_gives_what_an_array_gives() -> None:
    engine = make_engine(batch_size=3)
    wanted, found = engine(IMAGES), engine(torch.tensor(IMAGES))
    np.testing.assert_array_equal(found.logits, wanted.logits)
    np.testing.assert_array_equal(found.embeddings, wanted.embeddings)
    strided = torch.tensor(IMAGES).flip(0)[::2]
    np.testing.assert_array_equal(engine(strided).logits, engine(IMAGES[::-2].copy()).logits)
    assert engine(torch.tensor(IMAGES[:0])).logits.shape == (0, 5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.tensor(IMAGES).float(), r"must be uint8 \(n, 48, 48, 3\), not torch.float32 \(7, 48, 48, 3\)"),
        (torch.tensor(IMAGES).permute(0, 3, 1, 2), r"not torch.uint8 \(7, 3, 48, 48\)"),
        (torch.tensor(IMAGES, device="meta"), "images are on 'meta', and the engine on 'cpu'"),
    ],
    ids=["floats", "channels first", "elsewhere"],
)
def test_other_tensors_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine()(images)


def test_threads_that_call_it_at_once_get_what_is_theirs() -> None:
    engine = make_engine(batch_size=3)
    inputs = [IMAGES[start:] + np.uint8(start) for start in range(6)] * 4
    wanted = [engine(images) for images in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine, inputs))
    for got, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(got.logits, expected.logits)
        np.testing.assert_array_equal(got.embeddings, expected.embeddings)


def test_no_images_give_empty_outputs() -> None:
    output = make_engine()(IMAGES[:0])
    assert output.logits.shape == (0, 5)
    assert output.embeddings.shape == (0, 48)


def test_without_labels_the_logits_are_the_embeddings() -> None:
    output = make_engine(make_model(num_labels=0))(IMAGES)
    np.testing.assert_array_equal(output.logits, output.embeddings)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gives_about_the_same_without_ties(precision: str) -> None:
    model = make_model(num_labels=1000)
    wanted = make_engine(model)(IMAGES[:2])
    got = make_engine(model, precision=precision)(IMAGES[:2])
    assert got.logits.dtype == got.embeddings.dtype == np.float32
    assert not np.array_equal(got.logits, wanted.logits)
    np.testing.assert_allclose(got.logits, wanted.logits, atol=0.2, rtol=0)
    assert all(len(np.unique(row)) > 990 for row in got.logits)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.astype(np.float32), r"must be uint8 \(n, 48, 48, 3\), not float32 \(7, 48, 48, 3\)"),
        (IMAGES[0], r"must be uint8 \(n, 48, 48, 3\), not uint8 \(48, 48, 3\)"),
        (IMAGES[:, :40], r"must be uint8 \(n, 48, 48, 3\), not uint8 \(7, 40, 48, 3\)"),
        (IMAGES.transpose(0, 3, 1, 2), r"not uint8 \(7, 3, 48, 48\)"),
        (IMAGES[..., :1], r"not uint8 \(7, 48, 48, 1\)"),
    ],
    ids=["floats", "one image", "another size", "channels first", "grey"],
)
def test_other_arrays_are_refused(images: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine()(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, not 'tpu'"),
        ({"precision": "int8"}, "precision must be one of auto, fp32, bf16, fp16, not 'int8'"),
        ({"runtime": "tensorrt"}, "runtime must be one of torch, compile, openvino, not 'tensorrt'"),
        ({"batch_size": 0}, "batch_size must be 1 or more, not 0"),
        ({"model": make_model(num_channels=1)}, "takes images of 1 channels, its preprocessing makes 3"),
    ],
)
def test_other_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_unless_the_choice_is_free() -> None:
    with pytest.raises(ValueError, match="PyTorch finds no GPU"):
        make_engine(device="cuda")
    assert make_engine(device="auto").device.type == "cpu"


def test_two_first_calls_make_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, it keeps what was compiled."""
    made = []

    def slow(*arguments: Any) -> ThreadPoolExecutor:
        made.append(arguments)
        time.sleep(0.2)
        return ThreadPoolExecutor(*arguments)

    engine = make_engine()
    monkeypatch.setattr(engine_module, "ThreadPoolExecutor", slow)
    engine_thread.cache_clear()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(engine, [IMAGES, IMAGES]))
    assert made == [(1, "engine")]


class ShortOfMemory:
    """A runtime on a device that has memory for some images only."""

    def __init__(self, runtime: Runtime, most: int) -> None:
        self.batch_size = runtime.batch_size
        self.sizes: list[int] = []
        self._runtime = runtime
        self._most = most

    def __call__(self, images: np.ndarray | Tensor) -> Result:
        self.sizes.append(len(images))
        if len(images) > self._most:
            raise torch.OutOfMemoryError("out of memory")
        return self._runtime(images)


def test_a_device_out_of_memory_gets_smaller_batches_and_the_same_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = make_engine(batch_size=64)(IMAGES)
    devices: list[ShortOfMemory] = []

    def short_of_memory(runtime: Runtime) -> Runtime:
        devices.append(ShortOfMemory(runtime, most=3))
        return devices[-1]

    with_runtime(monkeypatch, short_of_memory)
    engine = make_engine(batch_size=64)
    (device,) = devices
    found = engine(IMAGES)
    assert engine.batch_size == 2
    assert_close(torch.tensor(found.logits), torch.tensor(wanted.logits))
    engine(IMAGES)
    assert device.sizes.count(2) >= len(IMAGES) // 2 * 2
    assert sum(size > 3 for size in device.sizes) <= 5


def test_a_device_without_memory_for_one_image_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with_runtime(monkeypatch, lambda runtime: ShortOfMemory(runtime, most=0))
    engine = make_engine(batch_size=4)
    with pytest.raises(torch.OutOfMemoryError):
        engine(IMAGES)


def test_automatic_precision_is_full_on_a_cpu_and_half_on_a_gpu() -> None:
    assert make_engine(precision="auto").precision == "fp32"
    assert resolve_precision("auto", "cuda") == "bf16"
    assert resolve_precision("fp16", "cpu") == "fp16"
