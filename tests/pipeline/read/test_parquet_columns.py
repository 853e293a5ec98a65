"""Image columns as writers of Parquet make them: types, structs and lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cvt.preprocessing import Preprocessor
from pipeline.decode import decode
from pipeline.read import ReadOptions, Sample, list_shards, read_samples
from pipeline.read.samples import ShardError
from pipeline.storage import Storage
from tests.makers import make_image, make_parquet

IMAGES = [make_image(i) for i in range(3)]
STRUCTS = [{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(IMAGES)]


def read(folder: Path, columns: dict[str, Any], image_column: str | None = None) -> list[Sample]:
    (folder / "x.parquet").write_bytes(make_parquet(columns))
    [shard] = list_shards(Storage(), str(folder))
    return list(read_samples(Storage(), shard, ReadOptions(image_column=image_column)))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_padding_of_fixed_size_binary_changes_no_pixel(format: str, tmp_path: Path) -> None:
    image, size = make_image(3, (60, 50), format), 40_000
    column = pa.array([image.ljust(size, b"\0"), None], pa.binary(size))
    ids = pa.array([b"0" * 16, b"1" * 16], pa.binary(16))
    padded, missing = read(tmp_path, {"id": ids, "picture": column})
    preprocessor = Preprocessor.from_dict({"size": 32}, "test")
    found, expected = (decode(data, preprocessor, 10**6) for data in (padded.image or b"", image))
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
        (pa.array([[image] for image in IMAGES]), None),
        (pa.array([[image] for image in IMAGES], pa.large_list(pa.large_binary())), None),
        (pa.array([[each] for each in STRUCTS]), ["0.jpg", "1.jpg", "2.jpg"]),
    ],
    ids=str,
)
def test_every_type_with_bytes_is_an_image_column(
    column: pa.Array, keys: list[str] | None, tmp_path: Path
) -> None:
    samples = read(tmp_path, {"n": [1, 2, 3], "image": column}, "image")
    assert [sample.image for sample in samples] == IMAGES
    assert [sample.key for sample in samples] == (keys or [f"{i:09d}" for i in range(3)])


def test_image_column_may_be_a_path_in_structs(tmp_path: Path) -> None:
    nested = pa.array([{"camera": {"image": each}, "n": 1} for each in STRUCTS])
    samples = read(tmp_path, {"sample": nested}, "sample.camera.image")
    assert [(sample.key, sample.image) for sample in samples] == [
        (f"{i}.jpg", image) for i, image in enumerate(IMAGES)
    ]
    with pytest.raises(ShardError, match=r"no column 'sample\.image'; set input\.image_column"):
        read(tmp_path, {"sample": nested}, "sample.image")


def test_list_with_other_than_one_image_is_an_error_row(tmp_path: Path) -> None:
    lists = pa.array([[IMAGES[0]], [], IMAGES, None, [None]], pa.list_(pa.binary()))
    one, empty, many, null, of_null = read(tmp_path, {"image": lists}, "image")
    assert one.image == IMAGES[0]
    assert empty.error == "no image: the row has a list of 0 images, not of one"
    assert many.error == "no image: the row has a list of 3 images, not of one"
    assert null.error == of_null.error == "no image: the row has no image bytes"


def test_decoded_pixels_are_refused_with_the_remedy(tmp_path: Path) -> None:
    pixels = pa.array([{"data": [1, 2, 3], "channel": 3, "height": 1, "width": 1}])
    with pytest.raises(ShardError, match="decoded pixels must be encoded"):
        read(tmp_path, {"image": pixels, "label": [1]})


def test_column_of_type_null_has_no_image(tmp_path: Path) -> None:
    assert [sample.image for sample in read(tmp_path, {"image": pa.nulls(2)})] == [None, None]
