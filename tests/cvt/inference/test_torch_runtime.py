from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from cvt.configuration import CvtConfig
from cvt.inference import engine as engine_module
from cvt.inference.network import InferenceNetwork
from cvt.inference.torch_runtime import TorchRuntime, max_images_per_part
from cvt.modeling import CvtStage
from tests.cvt.inference.small import (
    IMAGES,
    SIZE,
    make_engine,
    make_model,
    network,
    outputs_of_the_model,
)
from tests.cvt.random_models import TINY


def test_batches_are_split_so_that_activations_fit_the_cpu() -> None:
    config = CvtConfig(**TINY)
    an_image = 12 * 12 * 64 * 4  # the first stage's tokens, inside its MLP, in bytes
    assert max_images_per_part(config, SIZE, max_bytes=2 * an_image + 1) == 2
    assert max_images_per_part(config, SIZE, max_bytes=1) == 1
    model = make_model()
    runtime, sizes = TorchRuntime(network(model), 6, 2, threads=1, compiled=False), []

    def note(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, CvtStage):
            sizes.append(len(inputs[0]))

    with register_module_forward_pre_hook(note):
        found = [runtime(images)() for images in (IMAGES[:6], IMAGES[6:])]
    assert sizes == [size for size in (2, 2, 2, 1) for _ in range(3)]
    for split, whole in zip(zip(*found, strict=True), make_engine(model)(IMAGES), strict=True):
        np.testing.assert_allclose(np.concatenate(split), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runtime", "threads", "parts"),
    [
        ("torch", 1, [(7, 1)]),
        ("torch", 3, [(2, 1), (2, 1), (3, 1)]),
        ("torch", 16, [(1, 2)] * 7),
        ("compile", 3, [(8, 3)]),
    ],
)
def test_threads_take_parts_of_a_batch_or_compute_compiled_code_together(
    monkeypatch: pytest.MonkeyPatch, runtime: str, threads: int, parts: list[tuple[int, int]]
) -> None:
    """Parts as images and threads; the caller's own number of threads stays."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    before, seen = torch.get_num_threads(), []
    model = make_model()

    class Noting(InferenceNetwork):
        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            seen.append((len(pixels), torch.get_num_threads()))
            return super().forward(pixels)

    monkeypatch.setattr(engine_module, "InferenceNetwork", Noting)
    engine = make_engine(model, runtime=runtime, threads=threads, batch_size=8)
    logits, _ = outputs_of_the_model(model)
    np.testing.assert_allclose(engine(IMAGES).logits, logits, atol=1e-4, rtol=0)
    assert sorted(seen) == parts
    assert torch.get_num_threads() == before


def test_threads_that_do_not_divide_evenly_are_all_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, together = [], threading.Barrier(8)

    class Noting(InferenceNetwork):
        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            together.wait(10)  # so that each worker takes one
            seen.append(torch.get_num_threads())
            return super().forward(pixels)

    monkeypatch.setattr(engine_module, "InferenceNetwork", Noting)
    make_engine(threads=11, batch_size=8)(np.concatenate([IMAGES, IMAGES[:1]]))
    assert sorted(seen) == [1] * 5 + [2] * 3


COMPILED = """
import json, sys
import numpy as np, torch
from torch._dynamo.utils import counters
from tests.cvt.inference.small import make_engine, make_model, same_as_the_model
torch.set_num_threads(1)
model = make_model(depth=[1, 1, 1])
engine = make_engine(model, runtime="compile", batch_size=4)  # 7 images: the second batch is filled up
same_as_the_model(engine, model)
found = counters["stats"]["unique_graphs"], counters["inductor"]["fxgraph_cache_hit"]
json.dump(dict(zip(["graphs", "hits"], found)), sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler, which torch.compile needs")
def test_compiled_it_gives_what_the_model_gives_and_is_compiled_once_a_machine(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout))
    assert found == [{"graphs": 1, "hits": 0}, {"graphs": 1, "hits": 1}]
