"""What can be wrong with a checkpoint; by itself, since it is caught where torch is not loaded."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint can't be loaded; the message names it and the cause."""
