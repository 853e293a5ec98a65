"""The network in PyTorch on a CPU, eager or compiled. GPUs are the subject of `cuda_runtime`."""

from __future__ import annotations

import functools
import math
import queue
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cvt.configuration import CvtConfig
from cvt.inference.network import InferenceNetwork, Result

# glibc maps and unmaps every allocation above 32 MiB again, and the kernel clears its pages each time, which
# takes a fifth of a forward pass. Batches are split so that no activation is that large.
LARGEST_CPU_ACTIVATION = 32 * 2**20

# More workers would wait for Python's lock.
MOST_WORKERS = 8


class TorchRuntime:
    """Computes a batch in parts.

    In eager mode each worker computes a part of its own. If all threads shared each operation, they would
    wait for each other after every one, and activations would not stay in a core's cache. Compiled, the
    network takes parts of one size: the last one is padded. `at_once` limits the images in a part.
    """

    def __init__(
        self, network: InferenceNetwork, batch_size: int, at_once: int, threads: int, compiled: bool
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
        # Some workers may have one thread more than others.
        shares = queue.SimpleQueue[int]()
        for worker in range(self._workers):
            shares.put(threads // self._workers + (worker < threads % self._workers))
        self._pool = ThreadPoolExecutor(self._workers, "network", _take_threads, (shares,))

    def __call__(self, images: np.ndarray | Tensor) -> Result:  # noqa: D102 - see Runtime
        images = np.asarray(images)
        if self._compiled:
            parts = [images[start : start + self._split] for start in range(0, len(images), self._split)]
        else:
            parts = np.array_split(images, self._parts(len(images)))
        # All in one queue: no thread waits for the others at the end of a batch.
        outputs = [self._pool.submit(self._run, part) for part in parts]
        return functools.partial(_joined, outputs)

    def _parts(self, count: int) -> int:
        """The number of parts of a batch: equally many for each worker, and as few as `at_once` allows."""
        rounds = -(-count // (self._at_once * self._workers))
        return min(count, rounds * self._workers)

    @torch.inference_mode()
    def _run(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(part)
        # A copy, since PyTorch does not take read-only arrays, such as Ray's.
        pixels = torch.zeros((self._split if self._compiled else count, *part.shape[1:]), dtype=torch.uint8)
        pixels.numpy()[:count] = part
        logits, embeddings = self._forward(pixels)
        return logits[:count].numpy(), embeddings[:count].numpy()


def images_at_once(config: CvtConfig, size: int, largest_activation: int = LARGEST_CPU_ACTIVATION) -> int:
    """The number of images whose largest activation, inside an MLP, is below a size in bytes."""
    largest = 0
    for i, width in enumerate(config.embed_dim):
        size = (size + 2 * config.patch_padding[i] - config.patch_sizes[i]) // config.patch_stride[i]
        size += 1
        largest = max(largest, size**2 * math.ceil(width * max(config.mlp_ratio[i], 1)))
    return max(1, (largest_activation - 1) // (4 * largest))


def _take_threads(shares: queue.SimpleQueue[int]) -> None:
    """Sets the calling worker's number of threads in PyTorch to the next share."""
    torch.get_num_threads()  # the first call in a thread takes over what other threads have set
    torch.set_num_threads(shares.get())


def _joined(outputs: list[Future[tuple[np.ndarray, np.ndarray]]]) -> tuple[np.ndarray, np.ndarray]:
    logits, embeddings = zip(*(output.result() for output in outputs), strict=True)
    return np.concatenate(logits), np.concatenate(embeddings)
