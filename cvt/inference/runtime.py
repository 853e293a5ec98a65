"""Inference: uint8 images in, logits and embeddings out, on a CPU or a GPU.

Neither decodes nor resizes images, nor says what logits mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor


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
