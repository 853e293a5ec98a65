"""Loads and saves checkpoints in the published layouts: Hugging Face, Microsoft, TensorFlow.

`pipeline.classify` fetches checkpoints from object storage.
"""

from cvt.checkpoints.checkpoint import Checkpoint, load_checkpoint, read_labels, save_checkpoint
from cvt.checkpoints.files import BUNDLED
