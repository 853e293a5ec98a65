"""The engine: uint8 images in, logits and embeddings out, on a CPU or a GPU.

Decoding and resizing images, and the meaning of logits, belong to the pipeline.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cvt.inference.network import EngineOutput, InferenceNetwork, Result, Runtime
from cvt.inference.torch_runtime import TorchRuntime, images_at_once
from cvt.modeling import CvtForImageClassification
from cvt.preprocessing import Preprocessor
from cvt.runtimes import DEVICES, DTYPES, RUNTIMES, resolve_precision

logger = logging.getLogger("cvt_label")

PRECISIONS: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in DTYPES.items()}

#: Where compiled code is kept between runs, unless TORCHINDUCTOR_CACHE_DIR is set.
COMPILE_CACHE = "~/.cache/cvt-label/torchinductor"


class Engine:
    """A model that is ready to classify batches.

    The same images in the same call give the same bits on the same machine; results may differ by rounding
    when the batch differs. Several threads may call the engine: it starts the images of one call while
    another call waits for its results.

    Args:
        model: the model, which is copied.
        preprocessor: made the images; its mean, std and rescale factor are applied here.
        device: "cpu", "cuda", or "auto": a GPU if there is one.
        precision: "fp32", "bf16" or "fp16", of everything but normalization and head; or "auto": "bf16" on a
            GPU, "fp32" on a CPU. A CPU without instructions for half precision emulates it, far slower than
            "fp32".
        runtime: "torch"; "compile", with `torch.compile`, which takes a minute once per machine and shape of
            batch, and uses CUDA graphs on a GPU; or "openvino", for a CPU.
        batch_size: maximum number of images on the device at once; halved when a GPU runs out of memory.
        threads: CPU threads; PyTorch's own choice if None.

    Raises:
        ValueError: an argument is none of these, there is no GPU, model and preprocessor differ in their
            channels, or the runtime cannot run this model on this device.
        ImportError: the runtime is not installed.
    """

    def __init__(
        self,
        model: CvtForImageClassification,
        preprocessor: Preprocessor,
        *,
        device: str = "auto",
        precision: str = "fp32",
        runtime: str = "torch",
        batch_size: int = 64,
        threads: int | None = None,
    ) -> None:
        self.device = _find_device(device)
        self.precision = resolve_precision(precision, self.device.type)
        if runtime not in RUNTIMES:
            raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, not {runtime!r}")
        self.runtime = runtime
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
        channels = len(preprocessor.mean)
        if model.config.num_channels != channels:
            raise ValueError(
                f"the model takes images of {model.config.num_channels} channels,"
                f" its preprocessing makes {channels}"
            )
        self._image_shape = (preprocessor.size, preprocessor.size, channels)
        self._widths = (model.config.num_labels or model.config.embed_dim[-1], model.config.embed_dim[-1])
        threads = threads or torch.get_num_threads()
        self._runtime = make_runtime(
            model, preprocessor, self.device, self.precision, runtime, batch_size, threads
        )

    @property
    def batch_size(self) -> int:
        """Maximum number of images on the device at once."""
        return self._runtime.batch_size

    def __call__(self, images: np.ndarray | Tensor) -> EngineOutput:
        """Classifies images, uint8 (n, size, size, channels).

        Args:
            images: an array; or a tensor on the engine's device, which does not pass through the host.

        Raises:
            ValueError: the images have another type or shape, or are on another device.
        """
        pixel_type = torch.uint8 if isinstance(images, Tensor) else np.uint8
        if images.dtype != pixel_type or images.shape[1:] != self._image_shape:
            wanted = ", ".join(map(str, self._image_shape))
            raise ValueError(f"images must be uint8 (n, {wanted}), not {images.dtype} {tuple(images.shape)}")
        if isinstance(images, Tensor) and images.device.type != self.device.type:
            raise ValueError(f"images are on {images.device.type!r}, and the engine on {self.device.type!r}")
        if isinstance(images, Tensor):
            if self.device.type == "cuda":  # the caller's stream may still be computing them
                torch.cuda.current_stream(images.device).synchronize()
            else:
                images = images.numpy()
        with _thread_lock:  # otherwise two first calls would create a thread each
            thread = network_thread(os.getpid())
        results = thread.submit(self._begin, images).result()
        logits, embeddings = (np.empty((len(images), width), np.float32) for width in self._widths)
        for rows, result in results:
            logits[rows], embeddings[rows] = result()
        return EngineOutput(logits, embeddings)

    def _begin(self, images: np.ndarray | Tensor) -> list[tuple[slice, Result]]:
        results: list[tuple[slice, Result]] = []
        start = 0
        while start < len(images):
            rows = slice(start, start + self.batch_size)
            try:
                results.append((rows, self._runtime(images[rows])))
                start = rows.stop
                continue
            # Raised where memory is requested, which is here: queued batches are not affected.
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
            # After the block, which holds memory through the error. Later calls have the same batch size:
            # other programs may use the GPU too.
            self._runtime.batch_size //= 2
            torch.cuda.empty_cache()
            logger.warning("the GPU is out of memory: going on with batches of %d", self.batch_size)
        return results

    def warm_up(self) -> None:
        """Classifies black images, so that the next call does not wait for compilation and memory."""
        count = self.batch_size if self.device.type == "cuda" else 1
        for _ in range(2):  # a CUDA graph is recorded the second time
            self(np.zeros((count, *self._image_shape), np.uint8))


def make_runtime(
    model: CvtForImageClassification,
    preprocessor: Preprocessor,
    device: torch.device,
    precision: str,
    runtime: str,
    batch_size: int,
    threads: int,
) -> Runtime:
    """The runtime of an engine; see `Engine` for the arguments, none of which is "auto" or None here."""
    image_shape = (preprocessor.size, preprocessor.size, len(preprocessor.mean))
    if runtime == "openvino":
        from cvt.inference.openvino_runtime import OpenVinoRuntime

        if device.type != "cpu":
            raise ValueError(f"runtime 'openvino' is for a CPU, and device is {device.type!r}")
        network = InferenceNetwork(model, preprocessor, torch.float32)
        return OpenVinoRuntime(network, image_shape, precision, batch_size, threads)
    compiled = runtime == "compile"
    if compiled:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser(COMPILE_CACHE))  # noqa: PTH111
    network = InferenceNetwork(model, preprocessor, PRECISIONS[precision]).to(device)
    if device.type == "cuda":
        from cvt.inference.cuda_runtime import CudaRuntime

        return CudaRuntime(network, image_shape, batch_size, compiled)
    at_once = images_at_once(model.config, preprocessor.size)
    return TorchRuntime(network, batch_size, at_once, threads, compiled)


_thread_lock = threading.Lock()


@functools.cache
def network_thread(process: int) -> ThreadPoolExecutor:
    """The one thread of this process that runs networks.

    PyTorch keeps CUDA graphs per thread: compiled code fails in another thread. A fork has another process id
    and creates its own thread.
    """
    return ThreadPoolExecutor(1, "engine")


def _find_device(name: str) -> torch.device:
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but PyTorch finds no GPU")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
