"""The engine: computes logits and embeddings of uint8 images, on a CPU or a GPU.

The pipeline decodes and resizes images, and converts logits to labels.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from cvt.inference.network import EngineOutput, InferenceNetwork, Result, Runtime
from cvt.inference.torch_runtime import TorchRuntime, max_images_per_part
from cvt.preprocessing import Preprocessor
from cvt.runtimes import DEVICES, DTYPES, RUNTIME_DEVICES, RUNTIMES, resolve_precision

logger = logging.getLogger("cvt_label")

PRECISIONS: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in DTYPES.items()}

#: Folder for compiled code between runs, unless TORCHINDUCTOR_CACHE_DIR is set.
COMPILE_CACHE = "~/.cache/cvt-label/torchinductor"

#: The only thread of all engines: compiled code fails in others, which lack its CUDA graphs.
_thread = ThreadPoolExecutor(1, "engine")


class Engine:
    """Classifies batches of images with a model.

    The same images in the same call give the same bits on the same machine. Results may differ by rounding
    when the batch differs. Several threads may call the engine: it starts the images of one call while
    another call waits for its results.

    Args:
        model: a CvtClassifier or CvtForImageClassification. The engine makes a copy.
        preprocessor: preprocessor of the images. The engine applies its mean, std and rescale factor.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        precision: "fp32", "bf16", "fp16", or "auto" for "bf16" on a GPU and "fp32" on a CPU. Normalization
            and head always use float32. A CPU without instructions for half precision emulates it, which is
            much slower than "fp32".
        runtime: "torch" for eager PyTorch; "compile" for `torch.compile`, which takes a minute once per
            machine and batch shape, with CUDA graphs, on a GPU; "openvino" for OpenVINO on a CPU.
        batch_size: maximum number of images on the device at once. The engine halves this number when a GPU
            runs out of memory.
        threads: number of CPU threads. Default: PyTorch's default.

    Raises:
        ValueError: an argument is not valid or does not fit the others, or there is no GPU.
        ImportError: the runtime is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessor: Preprocessor,
        *,
        device: str = "auto",
        precision: str = "fp32",
        runtime: str = "torch",
        batch_size: int = 64,
        threads: int | None = None,
    ) -> None:
        if device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is 'cuda', but PyTorch finds no GPU")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.precision = resolve_precision(precision, self.device.type)
        if runtime not in RUNTIMES:
            raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, not {runtime!r}")
        if (needed := RUNTIME_DEVICES.get(runtime, self.device.type)) != self.device.type:
            raise ValueError(f"runtime {runtime!r} needs device {needed!r}, not {self.device.type!r}")
        self.runtime = runtime
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
        dtype = torch.float32 if runtime == "openvino" else PRECISIONS[self.precision]
        network = InferenceNetwork(model, preprocessor, dtype)
        config = network.model.config
        self._image_shape = (preprocessor.size, preprocessor.size, len(preprocessor.mean))
        if (channels := config.num_channels) != self._image_shape[-1]:
            raise ValueError(f"num_channels is {channels}, but the preprocessing has {self._image_shape[-1]}")
        self._widths = (network.model.num_labels or config.embed_dim[-1], config.embed_dim[-1])
        self._runtime = self._make_runtime(network, batch_size, threads or torch.get_num_threads())

    def _make_runtime(self, network: InferenceNetwork, batch_size: int, threads: int) -> Runtime:
        part_size = max_images_per_part(network.model.config, self._image_shape[0])
        if self.runtime == "openvino":
            from cvt.inference.openvino_runtime import OpenVinoRuntime

            shape, precision = self._image_shape, self.precision
            return OpenVinoRuntime(network, shape, precision, batch_size, part_size, threads)
        if self.device.type == "cpu":
            return TorchRuntime(network, batch_size, part_size, threads)
        from cvt.inference.cuda_runtime import CudaRuntime

        if compiled := self.runtime == "compile":
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser(COMPILE_CACHE))  # noqa: PTH111
        return CudaRuntime(network.to(self.device), self._image_shape, batch_size, compiled)

    @property
    def batch_size(self) -> int:
        """Maximum number of images on the device at once."""
        return self._runtime.batch_size

    def __call__(self, images: np.ndarray | Tensor) -> EngineOutput:
        """Classifies images.

        Args:
            images: uint8 (n, size, size, channels), an array or a tensor on the device of the engine. A
                tensor is not copied to the host.

        Raises:
            ValueError: the images have the wrong type or shape.
        """
        pixel_type = torch.uint8 if isinstance(images, Tensor) else np.uint8
        if images.dtype != pixel_type or images.shape[1:] != self._image_shape:
            expected = ", ".join(map(str, self._image_shape))
            raise ValueError(
                f"images must be uint8 (n, {expected}), not {images.dtype} {tuple(images.shape)}"
            )
        if isinstance(images, Tensor) and self.device.type == "cuda":
            # The caller's stream may still compute the images.
            torch.cuda.current_stream(images.device).synchronize()
        results = _thread.submit(self._start, images).result()
        logits, embeddings = (np.empty((len(images), width), np.float32) for width in self._widths)
        for rows, result in results:
            logits[rows], embeddings[rows] = result()
        return EngineOutput(logits, embeddings)

    def _start(self, images: np.ndarray | Tensor) -> list[tuple[slice, Result]]:
        results: list[tuple[slice, Result]] = []
        start = 0
        while start < len(images):
            rows = slice(start, start + self.batch_size)
            try:
                results.append((rows, self._runtime(images[rows])))
                start = rows.stop
                continue
            # The error is raised here, when memory is requested. Queued batches are not affected.
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
            # Outside of the except block, because the error keeps memory alive. Later calls use the smaller
            # batch size too, because other programs may use the GPU.
            self._runtime.batch_size //= 2
            torch.cuda.empty_cache()
            logger.warning("the GPU is out of memory: the batch size is now %d", self.batch_size)
        return results

    def warm_up(self) -> None:
        """Classifies black images, so that the next call needs no compilation or memory allocation."""
        # On a GPU, the second call records the CUDA graph.
        count, calls = (self.batch_size, 2) if self.device.type == "cuda" else (1, 1)
        for _ in range(calls):
            self(np.zeros((count, *self._image_shape), np.uint8))
