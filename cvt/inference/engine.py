"""Inference: uint8 images in, logits and embeddings out, on a CPU or a GPU.

Neither decodes nor resizes images, nor says what logits mean.
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

from cvt.inference.network import InferenceNetwork
from cvt.inference.runtime import EngineOutput, Result, Runtime
from cvt.inference.torch_runtime import TorchRuntime, images_at_once
from cvt.modeling import CvtForImageClassification
from cvt.preprocessing import Preprocessor
from cvt.runtimes import DEVICES, DTYPES, RUNTIMES, resolve_precision

logger = logging.getLogger("cvt_label")


PRECISIONS: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in DTYPES.items()}

#: Where compiled code is kept from run to run, unless TORCHINDUCTOR_CACHE_DIR says otherwise.
COMPILE_CACHE = "~/.cache/cvt-label/torchinductor"


class Engine:
    """A model that is ready to classify batches.

    The same images in the same call give the same bits on the same machine; in another company,
    they may differ by rounding. Several threads may call it: while one waits for its last images, the
    next one's are begun.

    Args:
        model: the model; a copy of it is used and it stays as it is.
        preprocessor: what made the images; its mean, std and rescale factor are applied here.
        device: "cpu", "cuda", or "auto": a GPU if there is one.
        precision: "fp32", "bf16" or "fp16", of everything but the normalisation and the head; or "auto":
            "bf16" on a GPU, "fp32" on a CPU. A CPU without instructions for the halves emulates them, far
            slower than "fp32".
        runtime: "torch"; "compile": with `torch.compile`, which takes a minute, once a machine and shape
            of batch, and on a GPU uses CUDA graphs; or "openvino", for a CPU.
        batch_size: most images that go to the device at once; halved where a GPU runs out of memory.
        threads: CPU threads; PyTorch's own choice if None.

    Raises:
        ValueError: an argument isn't one of these, or there is no GPU, or model and preprocessor
            differ in their channels, or the runtime can't do what is asked of it.
        ImportError: the runtime isn't installed.
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
        threads = threads or torch.get_num_threads()
        self._widths = (model.config.num_labels or model.config.embed_dim[-1], model.config.embed_dim[-1])
        self._runtime: Runtime
        if runtime == "openvino":
            from cvt.inference.openvino_runtime import OpenVinoRuntime

            if self.device.type != "cpu":
                raise ValueError(f"runtime 'openvino' is for a CPU, and device is {self.device.type!r}")
            network = InferenceNetwork(model, preprocessor, torch.float32)
            self._runtime = OpenVinoRuntime(network, self._image_shape, self.precision, batch_size, threads)
            return
        if runtime == "compile":
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser(COMPILE_CACHE))  # noqa: PTH111
        network = InferenceNetwork(model, preprocessor, PRECISIONS[self.precision]).to(self.device)
        if self.device.type == "cuda":
            from cvt.inference.cuda_runtime import CudaRuntime

            self._runtime = CudaRuntime(network, self._image_shape, batch_size, runtime == "compile")
            return
        at_once = images_at_once(model.config, preprocessor.size)
        self._runtime = TorchRuntime(network, batch_size, at_once, threads, runtime == "compile")

    @property
    def batch_size(self) -> int:
        """Most images that go to the device at once."""
        return self._runtime.batch_size

    def __call__(self, images: np.ndarray | Tensor) -> EngineOutput:
        """Classifies images, uint8 (n, size, size, channels).

        Args:
            images: an array; or a tensor on the engine's device, which doesn't pass through the host.

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
            if self.device.type == "cuda":  # what makes them may be queued on a stream of the caller's
                torch.cuda.current_stream(images.device).synchronize()
            else:
                images = images.numpy()
        with _thread_lock:  # or two first calls would make a thread each
            thread = _thread(os.getpid())
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
            # Raised where memory is asked for, which is here: what is queued already is not affected.
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
            self._halve()  # only now is free what the error has held on to
        return results

    def warm_up(self) -> None:
        """Classifies black images, so that the first call that counts finds everything made."""
        count = self.batch_size if self.device.type == "cuda" else 1
        for _ in range(2):  # a CUDA graph is recorded the second time
            self(np.zeros((count, *self._image_shape), np.uint8))

    def _halve(self) -> None:
        """Goes on with half the batch, for good: others may use the GPU too."""
        self._runtime.batch_size //= 2
        torch.cuda.empty_cache()
        logger.warning("the GPU is out of memory: going on with batches of %d", self.batch_size)


_thread_lock = threading.Lock()


@functools.cache
def _thread(process: int) -> ThreadPoolExecutor:
    """The one thread of this process that runs networks.

    PyTorch keeps CUDA graphs by thread: called from another one, compiled code fails. A fork has another
    process id, and makes its own.
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
