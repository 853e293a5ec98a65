"""The interface between the engine and its runtimes. Which runtime to use is decided in `engine`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor


class EngineOutput(NamedTuple):
    """The engine's result for n images.

    Attributes:
        logits: float32 (n, num_labels).
        embeddings: float32 (n, C), the normalized vectors that the classifier sees.
    """

    logits: np.ndarray
    embeddings: np.ndarray


#: Waits for a batch and returns its logits and embeddings, float32. Any thread may call it.
Result = Callable[[], tuple[np.ndarray, np.ndarray]]


class Runtime(Protocol):
    """Runs the network: uint8 (n, H, W, channels) to logits and embeddings, float32.

    One thread at a time may call it.

    Attributes:
        batch_size: maximum number of images in one call; may be lowered.
    """

    batch_size: int

    def __call__(self, images: np.ndarray | Tensor) -> Result:
        """Starts inference on 1 to `batch_size` images, which must not change until the result is read."""
