"""Tests of inference in PyTorch on a CPU."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from cvt.inference import engine as engine_module
from cvt.inference.network import InferenceNetwork
from cvt.inference.torch_runtime import TorchRuntime, max_images_per_part
from cvt.modeling import CvtConfig
from cvt.network import CvtStage
from tests.cvt.inference.small import (
    IMAGES,
    SIZE,
    make_engine,
    make_model,
    model_outputs,
    network,
)
from tests.cvt.random_models import TINY


def test_batches_are_split_to_limit_activations() -> None:
    config = CvtConfig(**TINY)
    image_bytes = 12 * 12 * 64 * 4  # the tokens of the first stage in its MLP
    assert max_images_per_part(config, SIZE, max_bytes=2 * image_bytes + 1) == 2
    assert max_images_per_part(config, SIZE, max_bytes=1) == 1
    model = make_model()
    runtime, sizes = TorchRuntime(network(model), 6, 2, threads=1), []

    def record_size(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, CvtStage):
            sizes.append(len(inputs[0]))

    with register_module_forward_pre_hook(record_size):
        found = [runtime(images)() for images in (IMAGES[:6], IMAGES[6:])]
    assert sizes == [size for size in (2, 2, 2, 1) for _ in range(3)]
    for split, whole in zip(zip(*found, strict=True), make_engine(model)(IMAGES), strict=True):
        np.testing.assert_allclose(np.concatenate(split), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("threads", "parts"),
    [
        (1, [(7, 1)]),
        (3, [(2, 1), (2, 1), (3, 1)]),
        (16, [(1, 2)] * 7),
    ],
)
def test_threads_compute_separate_parts(
    monkeypatch: pytest.MonkeyPatch, threads: int, parts: list[tuple[int, int]]
) -> None:
    """`parts` has the images and the threads of each part. The caller's number of threads does not change."""
    before, seen = torch.get_num_threads(), []
    model = make_model()

    class Recording(InferenceNetwork):
        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            seen.append((len(pixels), torch.get_num_threads()))
            return super().forward(pixels)

    monkeypatch.setattr(engine_module, "InferenceNetwork", Recording)
    engine = make_engine(model, threads=threads, batch_size=8)
    logits, _ = model_outputs(model)
    np.testing.assert_allclose(engine(IMAGES).logits, logits, atol=1e-4, rtol=0)
    assert sorted(seen) == parts
    assert torch.get_num_threads() == before


def test_all_threads_are_used_if_not_divisible_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, together = [], threading.Barrier(8)

    class Recording(InferenceNetwork):
        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            together.wait(10)  # makes each worker take one part
            seen.append(torch.get_num_threads())
            return super().forward(pixels)

    monkeypatch.setattr(engine_module, "InferenceNetwork", Recording)
    make_engine(threads=11, batch_size=8)(np.concatenate([IMAGES, IMAGES[:1]]))
    assert sorted(seen) == [1] * 5 + [2] * 3
