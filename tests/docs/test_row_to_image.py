"""The functions of docs/how-to/row-to-image.md find the encoded image of every row, in each format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import label
from pipeline.storage import Storage
from tests.docs.pages import blocks_of
from tests.makers import make_image, make_parquet, make_tar, make_tar_gz
from tests.runs import run_config

PAGE = "docs/how-to/row-to-image.md"
#: The file `read_image.py`, which the examples of the page import.
[MODULE] = [block for block in blocks_of("python", page=PAGE) if block.text.startswith("# read_image.py\n")]

#: Repeated keys, hidden members, a sample without an image, members before the image.
TAR = [
    ("a.jpg", make_image(1)),
    ("._b.jpg", b"hidden"),
    ("b.cls", b"3"),
    ("b.jpg", make_image(2)),
    ("a.jpg", make_image(3)),
    ("a.JPG", make_image(4)),
    ("only.json", b"{}"),
    ("sub/c.seg.png", b"another extension"),
    ("sub/c.png", make_image(5, format="PNG")),
]
ROWS = [make_image(n, format="PNG") for n in range(10, 15)]
INPUTS = {
    "x.tar": make_tar(TAR),
    "y.tar.gz": make_tar_gz(TAR),
    "binary.parquet": make_parquet({"image": ROWS, "n": range(5)}, row_group_size=2),
    "struct.parquet": make_parquet({"image": [{"bytes": b, "path": f"{n}.png"} for n, b in enumerate(ROWS)]}),
    "one.jpg": make_image(20),
    "sub/two.jpg": make_image(21),
}
#: The images of all rows without an error, by shard and index.
IMAGES = {
    **{
        (name, i): make_image(n)
        for name in ("x.tar", "y.tar.gz")
        for i, n in ((0, 1), (1, 2), (2, 3), (3, 4))
    },
    **{(name, 5): make_image(5, format="PNG") for name in ("x.tar", "y.tar.gz")},
    **{(f"{name}.parquet", n): image for name in ("binary", "struct") for n, image in enumerate(ROWS)},
    ("images", 0): make_image(20),
    ("images", 1): make_image(21),
}


def label_all(root: str, storage: Storage) -> list[dict[str, Any]]:
    """Labels all inputs; returns the rows that have no error."""
    for name, content in INPUTS.items():
        storage.write(f"{root}/in/{name}", content)
    result = label(run_config(root, "input.labels=false"))
    assert result.is_complete
    tables = result.partition.read_labels(["shard", "index", "key", "error"])
    return [row for table in tables for row in table.to_pylist() if row["error"] is None]


def functions() -> dict[str, Any]:
    """Returns the names that the file `read_image.py` of the page defines."""
    names: dict[str, Any] = {}
    exec(compile(MODULE.text, PAGE, "exec"), names)
    return names


@pytest.mark.parametrize("place", ["a folder", "a bucket"])
def test_read_image_returns_the_image_of_every_row(
    place: str, tmp_path: Path, bucket: str, storage: Storage
) -> None:
    root = str(tmp_path) if place == "a folder" else bucket
    rows = label_all(root, storage)
    read_image = functions()["read_image"]
    found = {
        (row["shard"].removeprefix(f"{root}/in/").partition("-")[0], row["index"]): read_image(
            row["shard"], row["index"], row["key"]
        )
        for row in rows
    }
    assert found == IMAGES


def test_examples_of_the_page_run(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = label_all(str(tmp_path), storage)
    [partition] = (tmp_path / "out").iterdir()
    (tmp_path / "out").rename(tmp_path / "labels")
    (tmp_path / "read_image.py").write_text(MODULE.text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks_of("python", page=PAGE):
        code = block.text.replace("model=cvt-13-1a2b3c4d", partition.name)
        exec(compile(code, block.name, "exec"), names)
        assert names
    output = capsys.readouterr().out
    saved = [path.relative_to(tmp_path) for path in (tmp_path / "review").iterdir()]
    assert len(saved) == 10 <= len(rows)
    for path in saved:
        content = (tmp_path / path).read_bytes()
        assert f"{path} {len(content)} bytes\n" in output
        assert path.suffix == (".png" if content.startswith(b"\x89PNG") else ".jpeg")
    assert {path.suffix for path in saved} == {".png", ".jpeg"}
    assert pq.read_table(f"labels/{partition.name}/manifest.parquet").num_rows == names["shards"].num_rows
    assert "(32, 24)" in output
