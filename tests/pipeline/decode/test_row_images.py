"""From a row of the labels to its image, in each format of the input."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import label, open_image
from pipeline.decode.row_images import read_image
from pipeline.read.samples import ShardError
from pipeline.storage import ObjectChanged, Storage
from tests.cases import case_input
from tests.makers import make_image, make_parquet, make_tar, make_tar_gz
from tests.runs import run_config

COLUMNS = ["shard", "index", "key", "uri", "version", "offset", "size", "error"]
#: Repeated keys, hidden members, a sample without an image, members before the image.
TAR = [
    ("a.jpg", make_image(1)),
    ("._b.jpg", b"hidden"),
    ("b.cls", b"3"),
    ("b.jpg", make_image(2)),
    ("a.jpg", make_image(3)),
    ("only.json", b"{}"),
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
IN_TAR = {index: content for index, (_, content) in enumerate([TAR[0], TAR[3], TAR[4], ("", b""), TAR[6]])}


def label_all(root: str) -> list[dict[str, Any]]:
    for name, content in INPUTS.items():
        Storage().write(f"{root}/in/{name}", content)
    result = label(run_config(root, "input.labels=false"))
    tables = result.partition.read_labels(COLUMNS)
    return [row for table in tables for row in table.to_pylist()]


def expected_image(row: dict[str, Any]) -> bytes:
    name = row["shard"].rpartition("/")[2]
    if ".tar" in name:
        return IN_TAR[row["index"]]
    return ROWS[row["index"]] if name.endswith(".parquet") else INPUTS[row["key"]]


@pytest.mark.parametrize("place", ["a folder", "a bucket"])
def test_image_of_every_row_is_found(place: str, tmp_path: Path, bucket: str) -> None:
    rows = label_all(str(tmp_path) if place == "a folder" else bucket)
    good = [row for row in rows if row["error"] is None]
    assert len(good) == 2 * 4 + 2 * 5 + 2
    for row in good:
        assert read_image(row) == expected_image(row), row
    assert open_image(good[0]).format in ("JPEG", "PNG")


@pytest.mark.parametrize("package", ["pandas", "pandas with NA", "duckdb"])
def test_row_of_a_data_frame_is_opened(tmp_path: Path, package: str) -> None:
    rows = label_all(str(tmp_path))
    unknown = {"uri": None, "version": None, "offset": None, "size": None}
    table = pa.Table.from_pylist([*rows, rows[0] | unknown])
    name = package.partition(" ")[0]
    pytest.importorskip(name, reason=f"{name} is not installed: cvt-label[consumers]")
    if package == "duckdb":
        import duckdb

        frame = duckdb.from_arrow(table).df()
    else:
        frame = table.to_pandas()
        frame = frame.convert_dtypes() if package == "pandas with NA" else frame
    for number, row in enumerate(rows):
        for found in (frame.iloc[number], frame.iloc[number].to_dict()):
            found["version"] = frame["version"].iloc[-1 if number % 2 else number]
            if row["error"] is None:
                assert read_image(found) == expected_image(row)
    with pytest.raises(ValueError, match=f"row {rows[0]['index']} of .* has no URI"):
        read_image(frame.iloc[-1])


def test_image_in_a_tar_needs_one_ranged_read(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for row in label_all(bucket) if row["offset"] is not None]
    assert len(rows) == 4
    assert all(row["size"] == len(expected_image(row)) for row in rows)
    from pipeline.storage import s3

    requests, get = list[tuple[int, int]](), s3.S3._get

    def recording(service: s3.S3, info: Any, start: int, stop: int) -> bytes:
        requests.append((start, stop))
        return get(service, info, start, stop)

    monkeypatch.setattr(s3.S3, "_get", recording)
    for row in rows:
        requests.clear()
        read_image(row)
        assert requests == [(row["offset"], row["offset"] + row["size"])]


def test_uri_is_the_image_file_or_the_file_of_the_shard(tmp_path: Path) -> None:
    rows = label_all(str(tmp_path))
    for row in rows:
        is_file = row["shard"].rpartition("/")[2].startswith("images-")
        assert row["uri"] == (f"{tmp_path}/in/{row['key']}" if is_file else row["shard"])
        assert row["version"] == Storage().version(row["uri"])


def test_replaced_object_is_an_error(tmp_path: Path) -> None:
    rows = label_all(str(tmp_path))
    for name in INPUTS:
        Storage().write(f"{tmp_path}/in/{name}", b"another object")
    for row in rows:
        with pytest.raises(Exception, match="no longer the expected version"):
            read_image(row)
    with pytest.raises(ObjectChanged):
        read_image(next(row for row in rows if row["offset"] is not None))


def test_row_without_an_image_is_an_error(tmp_path: Path) -> None:
    [row, _] = [row for row in label_all(str(tmp_path)) if row["error"] is not None]
    with pytest.raises(ValueError, match=r"row 3 of .* has no image: no image: no member has"):
        read_image(row)


def test_configuration_gives_the_image_column(tmp_path: Path) -> None:
    Storage().write(f"{tmp_path}/in/x.parquet", make_parquet({"a": ROWS, "b": ROWS[::-1]}))
    config = run_config(tmp_path, "input.image_column=b")
    rows = [row for table in label(config).partition.read_labels(COLUMNS) for row in table.to_pylist()]
    assert read_image(rows[0], config) == ROWS[4]


def test_images_in_parts_of_large_files_are_found(tmp_path: Path) -> None:
    data, image = io.BytesIO(), make_image()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        tar.addfile(link)
    Storage().write(f"{tmp_path}/in/x.tar", data.getvalue())
    Storage().write(f"{tmp_path}/in/y.parquet", make_parquet({"image": ROWS}, row_group_size=2))
    fields = ["read.split_bytes=1024", "input.labels=false"]
    config = run_config(tmp_path, "read.max_shard_samples=2", *fields)
    rows = [row for table in label(config).partition.read_labels(COLUMNS) for row in table.to_pylist()]
    in_parquet = [row for row in rows if ".parquet/rows-" in row["shard"]]
    assert [read_image(row, config) for row in in_parquet] == ROWS  # more rows than the limit: by row groups
    with pytest.raises(ShardError, match=r"read\.max_shard_samples"):
        read_image(in_parquet[0], run_config(tmp_path, "read.max_shard_samples=1", *fields))
    [lost] = [row for row in rows if row["error"] is not None]
    assert "read.split_bytes: null" in lost["error"]
    assert "/x.tar/bytes-" in lost["shard"]
    with pytest.raises(ValueError, match=r"has no image: unreadable image: 'link.jpg' is a link to 'a.jpg'"):
        read_image(lost)


@pytest.mark.parametrize("case", ["png-metadata", "jpeg-without-eoi"])
def test_every_labeled_image_of_a_case_can_be_opened(case: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, f"input.uri={case_input(case)}", "gate.max_error_fraction=null")
    rows = [row for table in label(config).partition.read_labels(COLUMNS) for row in table.to_pylist()]
    good = [row for row in rows if row["error"] is None]
    assert good
    for row in good:
        assert open_image(row).convert("RGB").getbbox() is not None
