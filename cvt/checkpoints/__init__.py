"""Loads and writes checkpoints in every published layout: Hugging Face, Microsoft, TensorFlow.

Fetching files from object storage does not belong here: see `pipeline.classify`.
"""

from cvt.checkpoints.checkpoint import BUNDLED, Checkpoint, load_checkpoint, read_labels, save_checkpoint
