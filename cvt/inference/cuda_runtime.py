"""Runs the network in PyTorch on a GPU, eager or compiled. `torch_runtime` is for CPUs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from cvt.inference.network import InferenceNetwork, Result


class CudaRuntime:
    """Queues batches on a GPU. The host prepares a batch while the GPU computes others.

    All calls must come from one thread. Arrays are copied to the GPU on a separate stream, so that copies
    overlap with computation. Computation and the copy of results use the current stream of the thread. The
    compiled network takes batches of exactly `batch_size` images: the last batch is padded.
    """

    def __init__(
        self, network: InferenceNetwork, image_shape: tuple[int, int, int], batch_size: int, compiled: bool
    ) -> None:
        self.batch_size = batch_size
        self._compiled = compiled
        self._device = network.scale.device
        self._forward = network.forward
        if compiled:
            # This mode uses CUDA graphs, which replace one launch per kernel by one launch per batch.
            self._forward = torch.compile(network, dynamic=False, fullgraph=True, mode="reduce-overhead")
        self._upload = torch.cuda.Stream(self._device)
        # Two buffers alternate: one is filled while the other is copied to the GPU. Their events wait without
        # using CPU time, which decoding needs.
        buffers = [pinned(batch_size, *image_shape, dtype=torch.uint8) for _ in range(2)]
        self._buffers = itertools.cycle([(buffer, torch.cuda.Event(blocking=True)) for buffer in buffers])

    @torch.inference_mode()
    def __call__(self, images: np.ndarray | Tensor) -> Result:  # noqa: D102 - see Runtime
        count = len(images)
        pixels = images if isinstance(images, Tensor) else self._to_device(images)
        if self._compiled:
            # The tensor must always have the same properties, or the network is compiled again.
            shape = (self.batch_size, *pixels.shape[1:])
            padded = torch.zeros(shape, dtype=torch.uint8, device=self._device)
            padded[:count] = pixels
            pixels = padded
        with reproducible_float32():
            outputs = self._forward(pixels.contiguous())
        # The next run of the CUDA graph overwrites these outputs. It runs on this stream, after these copies.
        logits, embeddings = (
            pinned(count, out.shape[1], dtype=torch.float32).copy_(out[:count], non_blocking=True)
            for out in outputs
        )
        done = torch.cuda.Event(blocking=True)
        done.record(torch.cuda.current_stream(self._device))

        def result() -> tuple[np.ndarray, np.ndarray]:
            done.synchronize()
            return logits.numpy(), embeddings.numpy()

        return result

    def _to_device(self, images: np.ndarray) -> Tensor:
        staged, uploaded = next(self._buffers)
        uploaded.synchronize()  # waits until the previous batch in this buffer is copied
        staged.numpy()[: len(images)] = images
        with torch.cuda.stream(self._upload):
            pixels = staged[: len(images)].to(self._device, non_blocking=True)
            uploaded.record(self._upload)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(uploaded)
        pixels.record_stream(computing)  # keeps the memory allocated until that stream has read it
        return pixels


@contextmanager
def reproducible_float32() -> Iterator[None]:
    """Computes with the same algorithms in every run, and never with TensorFloat-32 in place of float32.

    Otherwise cuDNN chooses. For matrix products, NVIDIA's containers allow TensorFloat-32 with the variable
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def pinned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Allocates pinned host memory, which a GPU copies asynchronously."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)
