"""Loads and saves checkpoints in the published layouts: Hugging Face, Microsoft, TensorFlow.

`pipeline.classify` fetches checkpoints from object storage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cvt.checkpoints.checkpoint import Checkpoint, read_labels, save_checkpoint
from cvt.checkpoints.files import BUNDLED

if TYPE_CHECKING:
    from cvt.checkpoints.loading import load_checkpoint


def __getattr__(name: str) -> Any:
    if name != "load_checkpoint":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cvt.checkpoints.loading import load_checkpoint  # imports torch, which takes a second

    return load_checkpoint
