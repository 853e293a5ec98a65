"""Datasets with tables of both formats, in a folder and in a bucket."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.publish.tables import FORMATS, Dataset, needs_format


@pytest.fixture(params=FORMATS)
def local(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    """A dataset in a folder."""
    needs_format(request.param)
    return Dataset(str(tmp_path), format=request.param)


@pytest.fixture(params=[f"{format}-{place}" for format in FORMATS for place in ("folder", "bucket")])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    """A dataset in a folder or a bucket. The catalog of an Iceberg table is a local file."""
    format, _, place = request.param.partition("-")
    needs_format(format)
    root = request.getfixturevalue("bucket") if place == "bucket" else str(tmp_path)
    return Dataset(root, format=format, catalog_folder=str(tmp_path))
