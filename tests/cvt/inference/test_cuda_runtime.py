"""Tests of inference in PyTorch on a GPU. Without a GPU, mocks replace streams and events."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cvt.inference.cuda_runtime import CudaRuntime, reproducible_float32
from tests.cvt.inference.small import (
    IMAGES,
    SIZE,
    make_engine,
    make_model,
    model_outputs,
    network,
)


class Overwriting:
    """Imitates a CUDA graph: batches have one size, and each run overwrites the previous outputs."""

    def __init__(self, network: nn.Module, size: int) -> None:
        self._network = network
        self._size = size
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        assert len(pixels) == self._size
        found = self._network(pixels)
        if not self._outputs:
            self._outputs = tuple(out.clone() for out in found)
        for kept, out in zip(self._outputs, found, strict=True):
            kept.copy_(out)
        return self._outputs


@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_runtime_does_not_mix_batches(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """Runs on the CPU with mocked streams. Tests the copies, not their order in time."""
    stream = MagicMock()
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "Event", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(
        "cvt.inference.cuda_runtime.pinned", lambda *shape, dtype: torch.empty(shape, dtype=dtype)
    )
    monkeypatch.setattr(torch, "compile", lambda network, **_: Overwriting(network, size=3))
    model = make_model()
    runtime = CudaRuntime(network(model), (SIZE, SIZE, 3), 3, compiled)
    engine = make_engine(model)
    engine._runtime = runtime
    assert engine.batch_size == 3
    logits, embeddings = model_outputs(model)
    for images in (
        IMAGES,
        torch.tensor(IMAGES),
        IMAGES,
    ):  # all batches are queued before the first result is read
        output = engine(images)
        np.testing.assert_allclose(output.logits, logits, atol=1e-4, rtol=0)
        np.testing.assert_allclose(output.embeddings, embeddings, atol=1e-4, rtol=0)


def test_float32_is_never_computed_in_tensorfloat_32() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as in NVIDIA's containers
    try:
        with reproducible_float32():
            assert torch.backends.cuda.matmul.allow_tf32 is False
            assert torch.backends.cudnn.allow_tf32 is False
            assert torch.backends.cudnn.deterministic
        assert torch.backends.cuda.matmul.allow_tf32 is True
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.2), ("fp16", 0.05)])
def test_gpu_engine_equals_the_model(precision: str, tolerance: float) -> None:
    model = make_model()
    logits, embeddings = model_outputs(model)
    engine = make_engine(model, device="auto", precision=precision)
    assert engine.device.type == "cuda"
    output = engine(IMAGES)
    np.testing.assert_allclose(output.logits, logits, atol=tolerance, rtol=0)
    np.testing.assert_allclose(output.embeddings, embeddings, atol=tolerance, rtol=0)
    np.testing.assert_array_equal(engine(IMAGES).logits, output.logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("runtime", ["torch", "compile"])
def test_gpu_engine_equals_the_model_with_many_threads(runtime: str) -> None:
    model = make_model()
    images = np.random.default_rng(1).integers(0, 256, (50, SIZE, SIZE, 3), dtype=np.uint8)
    logits, embeddings = model_outputs(model, images)
    engine = make_engine(model, device="cuda", runtime=runtime, batch_size=8)
    engine.warm_up()
    inputs: list[Any] = [images, torch.tensor(images, device="cuda")] * 6
    with ThreadPoolExecutor(3) as pool:
        for output in pool.map(engine, inputs):
            np.testing.assert_allclose(output.logits, logits, atol=1e-4, rtol=0)
            np.testing.assert_allclose(output.embeddings, embeddings, atol=1e-4, rtol=0)
