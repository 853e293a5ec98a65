"""docs/how-to/row-to-image.md: the code of the page runs, and finds the image of each row."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline import label
from pipeline.storage import Storage
from tests.docs.pages import blocks_of
from tests.makers import make_image, make_tar
from tests.runs import run_config

PAGE = "docs/how-to/row-to-image.md"
COLUMNS = ["shard", "index", "key", "uri", "version", "offset", "size"]


def test_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar").write_bytes(make_tar([(f"{n}.jpg", make_image(n)) for n in range(12)]))
    label(run_config(tmp_path))
    (tmp_path / "out").rename(tmp_path / "labels")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks_of("python", page=PAGE):
        exec(compile(block.text, block.name, "exec"), names)
    assert len(list((tmp_path / "review").iterdir())) == 10
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert all(" JPEG (32, 24)" in line for line in lines[:10])
    assert lines[10] == "(32, 24)"


def test_recipe_opens_images_in_a_bucket_with_one_ranged_read(bucket: str, storage: Storage) -> None:
    storage.write(f"{bucket}/in/x.tar", make_tar([(f"{n}.jpg", make_image(n)) for n in range(3)]))
    storage.write(f"{bucket}/in/y.jpg", make_image(3))
    partition = label(run_config(bucket)).partition
    names: dict[str, Any] = {}
    [recipe] = [block for block in blocks_of("python", page=PAGE) if "def open_in_s3" in block.text]
    exec(compile(recipe.text, recipe.name, "exec"), names)
    rows = [row for table in partition.read_labels(COLUMNS) for row in table.to_pylist()]
    found = [names["open_in_s3"](row).tobytes() for row in rows]
    expected = [Image.open(io.BytesIO(make_image(n))).tobytes() for n in (3, 0, 1, 2)]
    assert sorted(found) == sorted(expected)
