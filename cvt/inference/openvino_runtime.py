"""Runs the network in OpenVINO on a CPU. Needs `pip install 'cvt-label[openvino]'`."""

from __future__ import annotations

import functools
import queue
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cvt.inference.network import InferenceNetwork, Result
from cvt.runtimes import OPENVINO_MISSING

#: Maximum number of images in an inference request. More images of a small model are no faster.
_MAX_REQUEST_SIZE = 64

_HINTS = {"fp32": "f32", "bf16": "bf16"}


def import_openvino() -> Any:
    """Imports OpenVINO without telemetry.

    OpenVINO sends usage data over the network, from its import on, if it can import `openvino_telemetry`.
    """
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise ImportError(f"runtime: {OPENVINO_MISSING}") from error
    finally:
        sys.modules.pop("openvino_telemetry", None)
    return openvino


@functools.cache
def _core() -> Any:
    """Returns the core of this process, which is never deleted.

    OpenVINO's CPU plugin sets a signal stack for the thread that creates the plugin, and frees this stack
    when the plugin is deleted, in any thread. The next signal would then cause a segmentation fault.
    """
    return import_openvino().Core()


class OpenVinoRuntime:
    """Computes features in OpenVINO, with one request per thread, and the head in PyTorch.

    The network must be on the CPU and in float32. `part_size` limits the images in a request.
    """

    def __init__(
        self,
        network: InferenceNetwork,
        image_shape: tuple[int, int, int],
        precision: str,
        batch_size: int,
        part_size: int,
        threads: int,
    ) -> None:
        core = _core()
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision not in _HINTS or (precision == "bf16" and "BF16" not in capabilities):
            raise ValueError(f"runtime 'openvino' does not support precision {precision!r} on this CPU")
        self.batch_size = batch_size
        self._classifier = network.model.classifier
        rounds = -(-batch_size // (min(part_size, _MAX_REQUEST_SIZE) * threads))
        self._request_size = -(-batch_size // (rounds * threads))
        features = _convert(network, (self._request_size, *image_shape))
        options = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            # Each process would pin its threads to the same first cores, also with several classifiers.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = core.compile_model(features, "CPU", options)
        self._requests = queue.SimpleQueue[Any]()
        for _ in range(threads):
            self._requests.put(compiled.create_infer_request())
        self._pool = ThreadPoolExecutor(threads, "network")

    def __call__(self, images: np.ndarray | Tensor) -> Result:  # noqa: D102 - see Runtime
        images, size = np.asarray(images), self._request_size
        parts = (images[start : start + size] for start in range(0, len(images), size))
        outputs = [self._pool.submit(self._run, part) for part in parts]

        def result() -> tuple[np.ndarray, np.ndarray]:
            embeddings = np.concatenate([output.result() for output in outputs])
            with torch.inference_mode():
                return self._classifier(torch.from_numpy(embeddings)).numpy(), embeddings

        return result

    def _run(self, part: np.ndarray) -> np.ndarray:
        request, count = self._requests.get(), len(part)
        try:
            padded = np.pad(part, ((0, self._request_size - count), (0, 0), (0, 0), (0, 0)))
            return np.array(request.infer([padded])[0][:count])
        finally:
            self._requests.put(request)


def _convert(network: InferenceNetwork, shape: tuple[int, int, int, int]) -> Any:
    """Converts the features of the network, for images of `shape`, to a model of OpenVINO."""
    for module in network.modules():
        if isinstance(module, nn.AvgPool2d):
            module.register_forward_hook(_pool_average)
    example = torch.zeros((1, *shape[1:]), dtype=torch.uint8)
    # PyTorch warns that `torch.export` replaces traces, but exporting takes ten times as long.
    with torch.inference_mode(), warnings.catch_warnings(action="ignore"):
        # A function, in whose trace weights are constants. Tracing a module takes twice as long.
        traced = torch.jit.trace(lambda pixels: network.embed(pixels), example, check_trace=False)
        return import_openvino().convert_model(traced, input=list(shape), example_input=example)


def _pool_average(pool: nn.AvgPool2d, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Returns `output`, computed without padding: with padding, OpenVINO's values differ at the edges."""
    padded = F.pad(inputs[0], [pool.padding] * 4)  # type: ignore[list-item]
    averages = F.avg_pool2d(padded, pool.kernel_size, pool.stride, ceil_mode=True, count_include_pad=False)
    return averages[:, :, : output.shape[2], : output.shape[3]]
