"""Checkpoints of every published layout: Hugging Face, Microsoft's original files, TensorFlow.

Fetching files from object storage belongs to `pipeline.classify.checkpoint`.
"""

from cvt.checkpoints.checkpoint import (
    BUNDLED,
    Checkpoint,
    load_checkpoint,
    load_features,
    read_labels,
    save_checkpoint,
)

__all__ = ["BUNDLED", "Checkpoint", "load_checkpoint", "load_features", "read_labels", "save_checkpoint"]
