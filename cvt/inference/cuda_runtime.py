"""The network in PyTorch on a GPU, eager or compiled; the host prepares a batch while others are computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cvt.inference.network import InferenceNetwork

if TYPE_CHECKING:
    from cvt.inference.runtime import Result


class CudaRuntime:
    """The network on a GPU; see `cvt.engine.Runtime`. All calls have to come from one thread.

    A call returns when its work is queued. Arrays are copied to the GPU on a stream of their own, so that
    this overlaps with computing; computing and the way back are on the thread's current stream.

    Args:
        network: on its device.
        image_shape: (size, size, channels).
        batch_size: most images of one call.
        compiled: by `torch.compile`, for batches of exactly `batch_size` images: the last one is filled up.
    """

    def __init__(
        self, network: InferenceNetwork, image_shape: tuple[int, int, int], batch_size: int, compiled: bool
    ) -> None:
        self.batch_size = batch_size
        self._compiled = compiled
        self._device = network.scale.device
        self._forward = network.forward
        if compiled:
            # CUDA graphs spare the GPU the launch of each kernel by itself.
            self._forward = torch.compile(network, dynamic=False, fullgraph=True, mode="reduce-overhead")
        self._upload = torch.cuda.Stream(self._device)
        # Two, used in turn: one is filled while the other is copied from.
        self._staged = [_pinned(batch_size, *image_shape, dtype=torch.uint8) for _ in range(2)]
        self._uploaded = [_event() for _ in range(2)]

    @torch.inference_mode()
    def __call__(self, images: np.ndarray | Tensor) -> Result:
        """Queues n images; see `Runtime`."""
        count = len(images)
        pixels = images if isinstance(images, Tensor) else self._to_device(images)
        if self._compiled:
            # One kind of tensor, whatever comes in: another one would be compiled for again.
            shape = (self.batch_size, *pixels.shape[1:])
            filled_up = torch.zeros(shape, dtype=torch.uint8, device=self._device)
            filled_up[:count] = pixels
            pixels = filled_up
        # cuDNN left to itself may take another algorithm, or TensorFloat-32, from run to run.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            outputs = self._forward(pixels.contiguous())
        # A CUDA graph's outputs are overwritten by its next run: on this stream, after these copies.
        logits, embeddings = (
            _pinned(count, out.shape[1], dtype=torch.float32).copy_(out[:count], non_blocking=True)
            for out in outputs
        )
        done = _event()
        done.record(torch.cuda.current_stream(self._device))

        def result() -> tuple[np.ndarray, np.ndarray]:
            done.synchronize()
            return logits.numpy(), embeddings.numpy()

        return result

    def _to_device(self, images: np.ndarray) -> Tensor:
        staged, uploaded = self._staged[0], self._uploaded[0]
        self._staged.reverse()
        self._uploaded.reverse()
        uploaded.synchronize()  # the batch before the last one is out of this buffer
        staged.numpy()[: len(images)] = images
        with torch.cuda.stream(self._upload):
            pixels = staged[: len(images)].to(self._device, non_blocking=True)
            uploaded.record(self._upload)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(uploaded)
        pixels.record_stream(computing)  # its memory is not to be reused before that stream is done with it
        return pixels


def _event() -> torch.cuda.Event:
    """One that is waited for without keeping a CPU busy, which decodes meanwhile."""
    return torch.cuda.Event(blocking=True)


def _pinned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)
