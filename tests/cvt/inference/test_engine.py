from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.testing import assert_close

from cvt.configuration import CvtConfig
from cvt.inference import engine as engine_module
from cvt.inference.cuda_runtime import CudaRuntime
from cvt.inference.engine import Engine, make_runtime, network_thread
from cvt.inference.network import InferenceNetwork
from cvt.inference.openvino_runtime import import_openvino
from cvt.inference.runtime import Result, Runtime
from cvt.inference.torch_runtime import TorchRuntime, images_at_once
from cvt.modeling import CvtForImageClassification, CvtStage
from cvt.preprocessing import Preprocessor
from cvt.runtimes import resolve_precision
from tests.cvt.random_models import TINY, randomise

SIZE = 48
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSOR = Preprocessor(SIZE, crop_pct=0.875, resample=3, mean=MEAN, std=STD, rescale_factor=1 / 255)
IMAGES = np.random.default_rng(0).integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8)


def make_model(**fields: Any) -> CvtForImageClassification:
    return randomise(CvtForImageClassification(CvtConfig(**TINY | {"num_labels": 5} | fields)))


def network(model: CvtForImageClassification) -> InferenceNetwork:
    return InferenceNetwork(model, PREPROCESSOR, torch.float32)


def with_runtime(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Runtime], Runtime]) -> None:
    """From now on, engines have the runtime that `wrap` makes of theirs."""
    monkeypatch.setattr(engine_module, "make_runtime", lambda *arguments: wrap(make_runtime(*arguments)))


def make_engine(model: CvtForImageClassification | None = None, **options: Any) -> Engine:
    return Engine(model or make_model(), PREPROCESSOR, **{"device": "cpu"} | options)


@torch.inference_mode()
def outputs_of_the_model(
    model: CvtForImageClassification, images: np.ndarray = IMAGES
) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and what went into the classifier."""
    seen = []
    with model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        normalised = (images / 255 - MEAN) / STD
        logits = model(torch.tensor(normalised, dtype=torch.float32).permute(0, 3, 1, 2)).logits
    return logits.numpy(), seen[0].numpy()


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("method", ["dw_bn", "avg", "linear"])
def test_it_gives_what_the_model_gives(method: str, cls_token: bool) -> None:
    model = make_model(qkv_projection_method=[method] * 3, cls_token=[False, False, cls_token])
    logits, embeddings = outputs_of_the_model(model)
    output = make_engine(model)(IMAGES)
    assert output.logits.dtype == output.embeddings.dtype == np.float32
    np.testing.assert_allclose(output.logits, logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(output.embeddings, embeddings, atol=1e-4, rtol=0)


def test_it_gives_what_the_model_gives_at_the_size_of_cvt_13() -> None:
    model = randomise(CvtForImageClassification(CvtConfig(num_labels=1000)))
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


def test_batches_are_split_so_that_activations_fit_the_cpu() -> None:
    config = CvtConfig(**TINY)
    an_image = 12 * 12 * 64 * 4  # the first stage's tokens, inside its MLP, in bytes
    assert images_at_once(config, SIZE, largest_activation=2 * an_image + 1) == 2
    assert images_at_once(config, SIZE, largest_activation=1) == 1
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


def test_a_network_that_is_packed_for_onednn_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    packed, plain = network(model), network(model)
    packed.pack()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain.pack()
    linear = [sum(isinstance(m, nn.Linear) for m in each.model.cvt.modules()) for each in (packed, plain)]
    assert linear[0] == 0 < linear[1]
    with torch.inference_mode():
        assert_close(plain(torch.tensor(IMAGES)), packed(torch.tensor(IMAGES)), atol=1e-5, rtol=1e-5)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.2), ("fp16", 0.05)])
def test_a_gpu_gives_what_the_model_gives(precision: str, tolerance: float) -> None:
    model = make_model()
    logits, embeddings = outputs_of_the_model(model)
    engine = make_engine(model, device="auto", precision=precision)
    assert engine.device.type == "cuda"
    output = engine(IMAGES)
    np.testing.assert_allclose(output.logits, logits, atol=tolerance, rtol=0)
    np.testing.assert_allclose(output.embeddings, embeddings, atol=tolerance, rtol=0)
    np.testing.assert_array_equal(engine(IMAGES).logits, output.logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("runtime", ["torch", "compile"])
def test_a_gpu_gives_the_same_in_many_batches_by_many_threads_from_arrays_and_tensors(runtime: str) -> None:
    model = make_model()
    images = np.random.default_rng(1).integers(0, 256, (50, SIZE, SIZE, 3), dtype=np.uint8)
    logits, embeddings = outputs_of_the_model(model, images)
    engine = make_engine(model, device="cuda", runtime=runtime, batch_size=8)
    engine.warm_up()
    inputs: list[Any] = [images, torch.tensor(images, device="cuda")] * 6
    with ThreadPoolExecutor(3) as pool:
        for output in pool.map(engine, inputs):
            np.testing.assert_allclose(output.logits, logits, atol=1e-4, rtol=0)
            np.testing.assert_allclose(output.embeddings, embeddings, atol=1e-4, rtol=0)


class Overwriting:
    """A network compiled into a CUDA graph: batches of one size, and outputs that the next run overwrites."""

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
def test_the_runtime_of_a_gpu_keeps_batches_apart(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """On the CPU, with streams that do all at once: what is copied where, not when."""
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
    with_runtime(monkeypatch, lambda _: CudaRuntime(network(model), (SIZE, SIZE, 3), 3, compiled))
    engine = make_engine(model)
    assert engine.batch_size == 3
    logits, embeddings = outputs_of_the_model(model)
    for images in (IMAGES, torch.tensor(IMAGES), IMAGES):  # all batches are queued before the first is read
        output = engine(images)
        np.testing.assert_allclose(output.logits, logits, atol=1e-4, rtol=0)
        np.testing.assert_allclose(output.embeddings, embeddings, atol=1e-4, rtol=0)


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


def test_two_first_calls_make_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, it keeps what was compiled."""
    made = []

    def slow(*arguments: Any) -> ThreadPoolExecutor:
        made.append(arguments)
        time.sleep(0.2)
        return ThreadPoolExecutor(*arguments)

    engine = make_engine()
    monkeypatch.setattr(engine_module, "ThreadPoolExecutor", slow)
    network_thread.cache_clear()
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


def same_as_the_model(engine: Engine, model: CvtForImageClassification, tolerance: float = 1e-4) -> None:
    logits, embeddings = outputs_of_the_model(model)
    output = engine(IMAGES)
    assert output.logits.dtype == output.embeddings.dtype == np.float32
    np.testing.assert_allclose(output.logits, logits, atol=tolerance, rtol=0)
    np.testing.assert_allclose(output.embeddings, embeddings, atol=tolerance, rtol=0)
    again = engine(IMAGES)
    np.testing.assert_array_equal(again.logits, output.logits)
    np.testing.assert_array_equal(again.embeddings, output.embeddings)


needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="cvt-label[openvino] is not installed"
)


@needs_openvino
@pytest.mark.parametrize("method", ["dw_bn", "linear"])
def test_openvino_gives_what_the_model_gives(method: str) -> None:
    model = make_model(qkv_projection_method=[method] * 3)
    engine = make_engine(model, runtime="openvino", batch_size=5)  # 7 images: batches are filled up
    same_as_the_model(engine, model)
    assert engine(IMAGES[:0]).logits.shape == (0, 5)
    with pytest.raises(ValueError, match="runtime 'openvino' has no precision 'fp16' on this CPU"):
        make_engine(model, runtime="openvino", precision="fp16")
    with pytest.raises(ValueError, match="can't run a model whose qkv_projection_method is 'avg'"):
        make_engine(make_model(qkv_projection_method=["avg"] * 3), runtime="openvino")
    assert "openvino_telemetry" not in sys.modules


@needs_openvino
def test_openvino_in_half_precision_gives_about_the_same() -> None:
    if "BF16" not in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no instructions for bfloat16")
    model = make_model(num_labels=1000)
    engine = make_engine(model, runtime="openvino", precision="bf16")
    same_as_the_model(engine, model, tolerance=0.2)
    assert all(len(np.unique(row)) > 990 for row in engine(IMAGES).logits)


def test_without_openvino_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"pip install 'cvt-label\[openvino\]'"):
        make_engine(runtime="openvino")


COMPILED = """
import json, sys
import numpy as np, torch
from torch._dynamo.utils import counters
from tests.cvt.inference.test_engine import make_engine, make_model, same_as_the_model
torch.set_num_threads(1)
model = make_model(depth=[1, 1, 1])
engine = make_engine(model, runtime="compile", batch_size=4)  # 7 images: the second batch is filled up
same_as_the_model(engine, model)
found = counters["stats"]["unique_graphs"], counters["inductor"]["fxgraph_cache_hit"]
json.dump(dict(zip(["graphs", "hits"], found)), sys.stdout)
"""


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
