"""Fixtures for the tests of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.benchmarks.contenders import Task
from tests.makers import make_image, make_tar


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five PNG images in two tars, and a sample that is not an image."""
    folder = tmp_path / "images"
    folder.mkdir()
    encoded = [make_image(i, format="PNG") for i in range(5)]
    members = [(f"{i}.png", data) for i, data in enumerate(encoded)]
    (folder / "a.tar").write_bytes(make_tar([*members[:2], ("broken.png", b"not an image"), members[2]]))
    (folder / "b.tar").write_bytes(make_tar(members[3:]))
    return folder


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(
        tars=str(tmp_path / "tars"),
        files="",
        model="fashion-mnist",
        size=28,
        output=str(tmp_path / "output"),
        local=str(tmp_path / "local"),
        batch_size=1,
        device="cpu",
        precision="fp32",
        cores=1,
    )
