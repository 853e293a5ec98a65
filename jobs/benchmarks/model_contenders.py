"""The ways to run a CvT that `benchmark-model` measures: this package's engine, transformers, and exports.

All of them get the same images, decoded, and give logits; each is checked for how many came out, and for
what it says of them.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from cvt.inference.engine import PRECISIONS, Engine
from cvt.modeling import CvtForImageClassification
from cvt.preprocessing import Preprocessor
from cvt.runtimes import RUNTIMES, precisions_of
from jobs.console import err

#: Images in, logits out.
Classify = Callable[[np.ndarray], np.ndarray]


#: Largest logit differences to transformers' eager float32 that a way may have, by precision.
TOLERANCES = {"fp32": 1e-3, "bf16": 1.0, "fp16": 0.5}


def contenders(
    model: CvtForImageClassification,
    preprocessor: Preprocessor,
    device: str,
    batch_size: int,
    precisions: list[str],
    folder: Path,
) -> Iterator[tuple[str, str, Callable[[], Classify]]]:
    """Names, precisions, and what makes each way ready: calling it may take minutes.

    Args:
        model: the model.
        preprocessor: what made the images.
        device: "cpu" or "cuda".
        batch_size: images in a batch, everywhere.
        precisions: of the engine, and of transformers'.
        folder: for exported models.
    """
    has_openvino = device == "cpu" and _is_installed("openvino")
    runtimes = [name for name in RUNTIMES if name != "openvino" or has_openvino]

    def engine(runtime: str, precision: str) -> Classify:
        made = Engine(
            model, preprocessor, device=device, precision=precision, runtime=runtime, batch_size=batch_size
        )
        return lambda images: made(images).logits

    for precision in precisions:
        for runtime in runtimes:
            if precision in precisions_of(runtime):
                yield f"engine, {runtime}", precision, partial(engine, runtime, precision)
        for compiled in (False, True):
            name = f"transformers, {'compiled' if compiled else 'eager'}"
            make = partial(_transformers, model, preprocessor, device, precision, batch_size, compiled)
            yield name, precision, make
    if device == "cpu":
        missing = [name for name in ("openvino", "onnxruntime", "onnxscript") if not _is_installed(name)]
        if missing:
            message = f"not measured without {', '.join(missing)} (pip install 'cvt-label[contenders]')"
            err.print(message, markup=False, highlight=False)
        if "openvino" not in missing:
            make = partial(_openvino, model, preprocessor, batch_size)
            yield "OpenVINO, transformers' model", "fp32", make
        if not {"onnxruntime", "onnxscript"} & set(missing):
            make = partial(_onnxruntime, model, preprocessor, batch_size, folder)
            yield "ONNX Runtime, transformers' model", "fp32", make


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def reference(model: CvtForImageClassification, preprocessor: Preprocessor) -> Classify:
    """Transformers' own class with the same weights, eager, in float32, on the CPU."""
    return _transformers(model, preprocessor, "cpu", "fp32", 16, compiled=False)


def to_transformers(model: CvtForImageClassification) -> transformers.CvtForImageClassification:
    """The same weights, copied, in transformers' own class."""
    theirs = transformers.CvtForImageClassification(transformers.CvtConfig(**model.config.to_dict()))
    theirs.load_state_dict(model.state_dict())
    return theirs.eval()


def normalise(images: np.ndarray, preprocessor: Preprocessor, device: str = "cpu") -> Tensor:
    """Images, uint8 (n, H, W, 3), as transformers' model takes them: float32 (n, 3, H, W), on a device."""
    mean, std = (
        torch.tensor(values, device=device).view(-1, 1, 1) for values in (preprocessor.mean, preprocessor.std)
    )
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    return (pixels * preprocessor.rescale_factor - mean) / std


def matrix_rate(device: str, precision: str) -> float:
    """Multiply-accumulates a second of a large matrix product, the best of some: what a device can do."""
    dtype = PRECISIONS[precision]
    size = 8192 if device == "cuda" else 2048  # so large that its start doesn't count
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(repeats := 20 if device == "cuda" else 1):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, repeats * size**3 / (time.perf_counter() - start))
    return best


def _batches(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _transformers(
    subject: CvtForImageClassification,
    preprocessor: Preprocessor,
    device: str,
    precision: str,
    batch_size: int,
    compiled: bool,
) -> Classify:
    dtype = PRECISIONS[precision]
    model = to_transformers(subject).to(device, dtype)
    forward = torch.compile(model, dynamic=False) if compiled else model

    @torch.inference_mode()
    def classify(images: np.ndarray) -> np.ndarray:
        parts = [normalise(batch, preprocessor, device).to(dtype) for batch in _batches(images, batch_size)]
        logits: np.ndarray = torch.cat([forward(part).logits.float().cpu() for part in parts]).numpy()
        return logits

    return classify


def _openvino(model: CvtForImageClassification, preprocessor: Preprocessor, batch_size: int) -> Classify:
    from cvt.inference.openvino_runtime import import_openvino

    openvino = import_openvino()
    example = torch.zeros(2, 3, preprocessor.size, preprocessor.size)
    with torch.inference_mode():
        exported = openvino.convert_model(to_transformers(model), example_input=example)
    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(exported, "CPU", hints)
    streams = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")

    def classify(images: np.ndarray) -> np.ndarray:
        # As its guide to throughput says: a request a stream, the batch spread over them.
        size = max(1, batch_size // streams)
        inputs = [normalise(batch, preprocessor).numpy() for batch in _batches(images, size)]
        found: list[np.ndarray] = [np.empty(0)] * len(inputs)
        queue = openvino.AsyncInferQueue(compiled, streams)
        queue.set_callback(
            lambda request, place: found.__setitem__(place, request.get_output_tensor().data.copy())
        )
        for place, values in enumerate(inputs):
            queue.start_async([values], place)
        queue.wait_all()
        return np.concatenate(found)

    return classify


def _onnxruntime(
    model: CvtForImageClassification, preprocessor: Preprocessor, batch_size: int, folder: Path
) -> Classify:
    import onnxruntime

    example = torch.zeros(batch_size, 3, preprocessor.size, preprocessor.size)
    path = folder / f"{preprocessor.size}.onnx"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it reports its progress
        torch.onnx.export(to_transformers(model), (example,), str(path), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def classify(images: np.ndarray) -> np.ndarray:
        parts = []
        for batch in _batches(images, batch_size):
            pixels = normalise(batch, preprocessor).numpy()
            pixels = np.pad(pixels, ((0, batch_size - len(pixels)), (0, 0), (0, 0), (0, 0)))
            parts.append(session.run(None, {name: pixels})[0][: len(batch)])
        return np.concatenate(parts)

    return classify
