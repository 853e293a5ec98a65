"""Runs the network in PyTorch on a CPU. `cuda_runtime` is for GPUs."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cvt.architecture import Architecture, token_sides
from cvt.inference.network import InferenceNetwork, Result

# glibc maps and unmaps every allocation above 32 MiB separately, and the kernel clears its pages each time.
# This takes a fifth of a forward pass. Batches are split so that every activation is smaller.
MAX_ACTIVATION_BYTES = 32 * 2**20

# More workers would wait for Python's global interpreter lock.
MAX_WORKERS = 8


class TorchRuntime:
    """Computes a batch in parts.

    Each worker computes a separate part. If all threads shared each operation, they would wait for each other
    after each operation, and activations would not stay in the cache of a core.

    `part_size` limits the images in a part. `threads` is the number of CPU threads of all workers together.
    """

    def __init__(self, network: InferenceNetwork, batch_size: int, part_size: int, threads: int) -> None:
        self.batch_size = batch_size
        self._workers = min(threads, MAX_WORKERS)
        self._part_size = part_size
        self._network = network
        network.pack()
        self._pool = _make_pool(self._workers, threads)

    def __call__(self, images: np.ndarray | Tensor) -> Result:  # noqa: D102 - see Runtime
        parts = np.array_split(np.asarray(images), self._parts(len(images)))
        # All parts are in one queue, so no thread waits for others at the end of a batch.
        outputs = [self._pool.submit(self._run, part) for part in parts]

        def result() -> tuple[np.ndarray, np.ndarray]:
            logits, embeddings = zip(*(output.result() for output in outputs), strict=True)
            return np.concatenate(logits), np.concatenate(embeddings)

        return result

    def _parts(self, count: int) -> int:
        """Returns the number of parts: equal for all workers, and as small as `part_size` allows."""
        rounds = -(-count // (self._part_size * self._workers))
        return min(count, rounds * self._workers)

    @torch.inference_mode()
    def _run(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Copies the images, because PyTorch does not accept read-only arrays, such as those of Ray.
        logits, embeddings = self._network(torch.from_numpy(part.copy()))
        return logits.numpy(), embeddings.numpy()


def max_images_per_part(config: Architecture, size: int, max_bytes: int = MAX_ACTIVATION_BYTES) -> int:
    """Returns the number of images whose largest activation, in an MLP, is smaller than `max_bytes`."""
    stages = zip(token_sides(config, size), config.embed_dim, config.mlp_ratio, strict=True)
    largest = max(side**2 * math.ceil(width * max(ratio, 1)) for side, width, ratio in stages)
    return max(1, (max_bytes - 1) // (4 * largest))


def _make_pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Returns workers whose numbers of PyTorch threads differ by at most one."""
    counts = [threads // workers + (worker < threads % workers) for worker in range(workers)]

    def set_threads() -> None:
        torch.get_num_threads()  # the first call in a thread copies the setting of other threads
        torch.set_num_threads(counts.pop(0))

    return ThreadPoolExecutor(workers, "network", set_threads)
