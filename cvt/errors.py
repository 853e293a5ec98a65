"""What can be wrong with a checkpoint; by itself, since it is caught where torch is not loaded."""

from __future__ import annotations

from collections.abc import Iterable


class CheckpointError(ValueError):
    """A checkpoint can't be loaded; the message names it and the cause."""


class NoClassifierError(CheckpointError):
    """The weights are those of a CvtModel alone, which can't label."""


def some(keys: Iterable[str], most: int = 8) -> str:
    """The first of some keys, in order, for a message."""
    names = sorted(keys)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
