"""Image columns as writers of Parquet make them: types, structs and lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cvt.preprocessing import Preprocessor
from pipeline.decode import DecodeOptions, decode
from pipeline.read import Sample, read_samples
from pipeline.read.samples import ShardError
from pipeline.storage import Storage
from tests.makers import list_shards, make_image, make_parquet
from tests.read_options import read_options

IMAGES = [make_image(i) for i in range(3)]
STRUCTS = [{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(IMAGES)]


def read(folder: Path, columns: dict[str, Any], image_column: str | None = None) -> list[Sample]:
    (folder / "x.parquet").write_bytes(make_parquet(columns))
    [shard] = list_shards(Storage(), str(folder))
    return list(read_samples(Storage(), shard, read_options(image_column=image_column)))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_padding_of_fixed_size_binary_changes_no_pixel(format: str, tmp_path: Path) -> None:
    image, size = make_image(3, (60, 50), format), 40_000
    column = pa.array([image.ljust(size, b"\0"), None], pa.binary(size))
    ids = pa.array([b"0" * 16, b"1" * 16], pa.binary(16))
    padded, missing = read(tmp_path, {"id": ids, "picture": column})
    preprocessor = Preprocessor.from_dict({"size": 32}, "test")
    found, expected = (
        decode(data, DecodeOptions(preprocessor, 10**6)) for data in (padded.image or b"", image)
    )
    assert found.error is None
    assert np.array_equal(found.pixels, expected.pixels)  # type: ignore[arg-type]
    assert str(missing.error).startswith("no image")


VIEW = pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])
INDICES = pa.array([0, 1, 2], pa.int8())


@pytest.mark.parametrize(
    ("column", "keys"),
    [
        (pa.array(IMAGES, pa.binary_view()), None),
        (pa.array(IMAGES, pa.large_binary()), None),
        (pa.DictionaryArray.from_arrays(INDICES, pa.array(IMAGES)), None),
        (pa.array(STRUCTS, VIEW), ["0.jpg", "1.jpg", "2.jpg"]),
    ],
    ids=str,
)
def test_every_type_with_bytes_is_an_image_column(
    column: pa.Array, keys: list[str] | None, tmp_path: Path
) -> None:
    samples = read(tmp_path, {"n": [1, 2, 3], "image": column}, "image")
    assert [sample.image for sample in samples] == IMAGES
    assert [sample.key for sample in samples] == (keys or [f"{i:09d}" for i in range(3)])


def test_column_of_type_null_has_no_image(tmp_path: Path) -> None:
    assert [sample.image for sample in read(tmp_path, {"image": pa.nulls(2)})] == [None, None]


@pytest.mark.parametrize(
    "column",
    [pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), pa.array([{"a": 1, "b": 2}])],
    ids=["map", "struct"],
)
def test_carried_column_with_several_parts_is_refused_with_a_remedy(column: pa.Array, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(make_parquet({"image": IMAGES[:1], "c": column}))
    [shard] = list_shards(Storage(), str(tmp_path))
    with pytest.raises(ShardError, match=r"input\.carry: column 'c' has several parts: .*as JSON text"):
        list(read_samples(Storage(), shard, read_options(carry={"c": None})))
