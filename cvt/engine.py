"""Inference: uint8 images in, logits and embeddings out, on a CPU or a GPU.

Neither decodes nor resizes images, nor says what logits mean.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cvt.configuration import CvtConfig
from cvt.inference_network import InferenceNetwork
from cvt.modeling import CvtForImageClassification
from cvt.preprocessing import Preprocessor
from cvt.runtimes import DEVICES, DTYPES, RUNTIMES

logger = logging.getLogger("cvt_label")

PRECISIONS: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in DTYPES.items()}
#: Where compiled code is kept from run to run, unless TORCHINDUCTOR_CACHE_DIR says otherwise.
COMPILE_CACHE = "~/.cache/cvt-label/torchinductor"

# glibc maps and unmaps every allocation above 32 MiB afresh, and the kernel clears its pages each
# time: a fifth of a forward pass. On a CPU, batches are split so that no activation is so large.
LARGEST_CPU_ACTIVATION = 32 * 2**20

# Of a CPU's threads, those that go through the network by themselves: more would wait for Python's lock.
MOST_WORKERS = 8


class EngineOutput(NamedTuple):
    """What the engine says of n images.

    Attributes:
        logits: float32 (n, num_labels).
        embeddings: float32 (n, C), the normalised vectors that the classifier sees.
    """

    logits: np.ndarray
    embeddings: np.ndarray


#: Waits for logits and embeddings of a batch, float32; in any thread.
Result = Callable[[], tuple[np.ndarray, np.ndarray]]


class Runtime(Protocol):
    """What runs the network: uint8 (n, H, W, channels) to logits and embeddings, float32.

    `batch_size` is the most images of one call; it may be lowered. Not for several threads at once.
    """

    batch_size: int

    def __call__(self, images: np.ndarray | Tensor) -> Result:
        """Begins with n images, n from 1 to `batch_size`; they stay as they are until the result is there."""


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
            from cvt.openvino_runtime import OpenVinoRuntime

            if self.device.type != "cpu":
                raise ValueError(f"runtime 'openvino' is for a CPU, and device is {self.device.type!r}")
            network = InferenceNetwork(model, preprocessor, torch.float32)
            self._runtime = OpenVinoRuntime(network, self._image_shape, self.precision, batch_size, threads)
            return
        if runtime == "compile":
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser(COMPILE_CACHE))  # noqa: PTH111
        network = InferenceNetwork(model, preprocessor, PRECISIONS[self.precision]).to(self.device)
        if self.device.type == "cuda":
            from cvt.cuda_runtime import CudaRuntime

            self._runtime = CudaRuntime(network, self._image_shape, batch_size, runtime == "compile")
            return
        at_once = _images_at_once(model.config, preprocessor.size)
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


class TorchRuntime:
    """The network in PyTorch on a CPU, eager or compiled.

    A batch goes through the network in parts. Eager, each thread computes a part of its own, rather than all
    threads each operation together: they needn't wait for one another at every one, and a part's
    activations stay in a core's cache.

    Args:
        network: on the CPU.
        batch_size: most images of one call.
        at_once: most images of a part.
        threads: that compute.
        compiled: by `torch.compile`, for parts of one size: the last one is filled up.
    """

    def __init__(
        self,
        network: InferenceNetwork,
        batch_size: int,
        at_once: int,
        threads: int,
        compiled: bool,
    ) -> None:
        self.batch_size = batch_size
        self._workers = 1 if compiled else min(threads, MOST_WORKERS)
        self._at_once = at_once
        self._compiled = compiled
        self._network = network
        self._forward = network.forward
        if compiled:
            self._forward = torch.compile(network, dynamic=False, fullgraph=True)
        else:
            network.pack()
        self._split = -(-batch_size // self._parts(batch_size))
        # Some workers have one thread more than others, if need be.
        shares = queue.SimpleQueue[int]()
        for worker in range(self._workers):
            shares.put(threads // self._workers + (worker < threads % self._workers))
        self._pool = ThreadPoolExecutor(self._workers, "network", _take_threads, (shares,))

    def __call__(self, images: np.ndarray | Tensor) -> Result:
        """Begins with n images; see `Runtime`."""
        images = np.asarray(images)
        if self._compiled:
            parts = [images[start : start + self._split] for start in range(0, len(images), self._split)]
        else:
            parts = np.array_split(images, self._parts(len(images)))
        # All in one queue: no thread waits for the others at the end of a batch.
        outputs = [self._pool.submit(self._run, part) for part in parts]
        return functools.partial(_joined, outputs)

    def _parts(self, count: int) -> int:
        """Parts of so many images: as many for each worker, and as few as `at_once` allows."""
        rounds = -(-count // (self._at_once * self._workers))
        return min(count, rounds * self._workers)

    @torch.inference_mode()
    def _run(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(part)
        # A copy, as PyTorch doesn't take read-only arrays, which Ray gives.
        pixels = torch.zeros((self._split if self._compiled else count, *part.shape[1:]), dtype=torch.uint8)
        pixels.numpy()[:count] = part
        logits, embeddings = self._forward(pixels)
        return logits[:count].numpy(), embeddings[:count].numpy()


def _take_threads(shares: queue.SimpleQueue[int]) -> None:
    """Takes the next share of threads for this one's work in PyTorch."""
    torch.get_num_threads()  # a thread's first look takes over what others have set last
    torch.set_num_threads(shares.get())


def _joined(outputs: list[Future[tuple[np.ndarray, np.ndarray]]]) -> tuple[np.ndarray, np.ndarray]:
    logits, embeddings = zip(*(output.result() for output in outputs), strict=True)
    return np.concatenate(logits), np.concatenate(embeddings)


def resolve_precision(precision: str, device: str) -> str:
    """What `precision` means on a device, "cpu" or "cuda".

    Raises:
        ValueError: it means nothing.
    """
    if precision == "auto":
        return "bf16" if device == "cuda" else "fp32"
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of auto, {', '.join(PRECISIONS)}, not {precision!r}")
    return precision


def _find_device(name: str) -> torch.device:
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but PyTorch finds no GPU")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _images_at_once(config: CvtConfig, size: int) -> int:
    """Images for which the largest activation, inside an MLP, is below LARGEST_CPU_ACTIVATION."""
    largest = 0
    for i, width in enumerate(config.embed_dim):
        size = (size + 2 * config.patch_padding[i] - config.patch_sizes[i]) // config.patch_stride[i]
        size += 1
        largest = max(largest, size**2 * math.ceil(width * max(config.mlp_ratio[i], 1)))
    return max(1, (LARGEST_CPU_ACTIVATION - 1) // (4 * largest))
