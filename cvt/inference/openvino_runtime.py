"""Runs the network in OpenVINO on a CPU. Needs `pip install 'cvt-label[openvino]'`."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvt.inference.network import InferenceNetwork, Result
from cvt.runtimes import OPENVINO_MISSING

#: Number of images in an inference request. Activations fit the cache, and matrices are large enough.
_REQUEST_SIZE = 8

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


class OpenVinoRuntime:
    """Computes features in OpenVINO, with one request per thread, and the head in PyTorch.

    The network must be on the CPU and in float32.
    """

    def __init__(
        self,
        network: InferenceNetwork,
        image_shape: tuple[int, int, int],
        precision: str,
        batch_size: int,
        threads: int,
    ) -> None:
        openvino = import_openvino()
        core = openvino.Core()
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision not in _HINTS or (precision == "bf16" and "BF16" not in capabilities):
            raise ValueError(f"runtime 'openvino' does not support precision {precision!r} on this CPU")
        config = network.model.config
        # OpenVINO converts the edges of average pooling incorrectly.
        if "avg" in config.qkv_projection_method:
            raise ValueError("runtime 'openvino' does not support qkv_projection_method 'avg'")
        self.batch_size = batch_size
        self._network = network
        self._request_size = min(_REQUEST_SIZE, -(-batch_size // threads))
        self._width = config.embed_dim[-1]
        example = torch.zeros((self._request_size, *image_shape), dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a warning of PyTorch about its own code
            exported = openvino.convert_model(torch.export.export(_Features(network), (example,)))
        options = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
        }
        self._queue = openvino.AsyncInferQueue(core.compile_model(exported, "CPU", options), threads)
        self._queue.set_callback(self._keep)

    def __call__(self, images: np.ndarray | Tensor) -> Result:  # noqa: D102 - see Runtime
        images = np.asarray(images)
        embeddings = np.empty((len(images), self._width), np.float32)
        for start in range(0, len(images), self._request_size):
            part = images[start : start + self._request_size]
            padding = self._request_size - len(part)
            if padding:
                part = np.pad(part, ((0, padding), (0, 0), (0, 0), (0, 0)))
            self._queue.start_async(
                [np.ascontiguousarray(part)], embeddings[start : start + self._request_size]
            )
        self._queue.wait_all()
        with torch.inference_mode():
            logits: np.ndarray = self._network.model.classifier(torch.from_numpy(embeddings)).numpy()
        return lambda: (logits, embeddings)

    @staticmethod
    def _keep(request: Any, rows: np.ndarray) -> None:
        rows[:] = request.get_output_tensor().data[: len(rows)]


class _Features(torch.nn.Module):
    """The part of the network that OpenVINO runs."""

    def __init__(self, network: InferenceNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network.embed(pixels)
