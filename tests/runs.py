"""Labeling runs in the test process, with the bundled model: a small run takes less than a second."""

from __future__ import annotations

import pytest

from pipeline.config import Config, load_config
from pipeline.read import shards

#: The bundled model, without Ray, on one thread, with small chunks.
IN_PROCESS = (
    "model.path=fashion-mnist",
    "ray.address=in-process",
    "read.chunk_images=5",
    "classify.batch_size=64",
    "classify.threads=1",
)


def run_fields(root: object, *overrides: str) -> list[str]:
    """Returns configuration fields of a run from `root`/in to `root`/out."""
    return [f"input.uri={root}/in", f"output.uri={root}/out", *IN_PROCESS, *overrides]


def run_config(root: object, *overrides: str) -> Config:
    """Returns the configuration of a run from `root`/in to `root`/out."""
    return load_config(Config, None, run_fields(root, *overrides))


def small_groups(patch: pytest.MonkeyPatch) -> None:
    """Sets the mean size of a group to 4 image files."""
    patch.setattr(shards, "_MEAN_GROUP_SIZE", 4)
