"""Inputs from public bug reports: nulls in Parquet, ends of tars, and kinds of labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.read import ReadOptions, Sample, read_samples
from pipeline.read.samples import ShardError
from pipeline.storage import Storage
from tests.cases import case_input
from tests.makers import list_shards
from tests.read_options import read_options

#: The classes of the bundled model, which the cases use.
NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"]
FASHION = read_options(label_column="label", class_names=NAMES)


def read(path: Path, options: ReadOptions = FASHION) -> list[Sample]:
    storage = Storage()
    [shard] = list_shards(storage, str(path))
    return list(read_samples(storage, shard, options))


@pytest.mark.parametrize(
    ("name", "errors"),
    [
        ("hf", ["no image", "no image", None, None]),
        ("img2dataset", [None, "no image", None]),
        ("all_null", ["no image"] * 3),
        ("empty", []),
    ],
)
def test_null_image_is_an_error_row_beside_good_rows(name: str, errors: list[str | None]) -> None:
    samples = read(case_input("parquet-nulls") / f"{name}.parquet", ReadOptions())
    assert [sample.error and sample.error.partition(":")[0] for sample in samples] == errors
    assert [sample.image is None for sample in samples] == [error is not None for error in errors]


@pytest.mark.parametrize(
    ("name", "keys"),
    [("dashA", ["a", "b"]), ("dashr", ["a", "z"]), ("one_block", ["a"]), ("a", ["a"]), ("b", ["b"])],
)
def test_every_complete_tar_is_read_to_its_end(name: str, keys: list[str]) -> None:
    samples = read(case_input("tar-ends") / f"{name}.tar")
    assert [(sample.key, sample.error) for sample in samples] == [(key, None) for key in keys]


@pytest.mark.parametrize(
    ("name", "cause"), [("no_end", "truncated at byte 2560"), ("cat", "several tars were concatenated")]
)
def test_other_end_of_a_tar_is_a_clear_error(name: str, cause: str) -> None:
    with pytest.raises(ShardError, match=cause):
        read(case_input("tar-ends") / f"{name}.tar")


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("binary", [7, 7]),
        ("bool", ["True", "False"]),
        ("decimal", [3, None]),
        ("dictionary", [7, 7]),
        ("float", [3, None]),
        ("large_string", [7, 7]),
        ("list", ["list", "list"]),
        ("string_view", [7, 7]),
        ("uint8", [3, 7]),
        ("cls", [3, 3, 3, 3, 7, "'sneaker'", "''", 3, 3, 7, "'３'", '''"b'3'"''']),  # noqa: RUF001
    ],
)
def test_label_that_plainly_names_a_class_is_its_target(name: str, targets: list[int | str | None]) -> None:
    """Text stands for a label that is no class of the model: the reason has this text."""
    path = case_input("labels-kinds") / (f"{name}.tar" if name == "cls" else f"{name}.parquet")
    samples = read(path)
    assert all(sample.image and sample.error is None for sample in samples)
    assert [sample.target for sample in samples] == [x if isinstance(x, int) else None for x in targets]
    assert [sample.unmatched is not None for sample in samples] == [isinstance(x, str) for x in targets]
    assert all(str(x) in (sample.unmatched or str(x)) for x, sample in zip(targets, samples, strict=True))


def test_every_file_with_image_bytes_is_a_shard_whatever_its_writer() -> None:
    storage, refused = Storage(), []
    for shard in list_shards(storage, str(case_input("parquet-view"))):
        try:
            samples = list(read_samples(storage, shard, ReadOptions()))
            assert [sample.error for sample in samples] == [None, None]
        except ShardError as error:
            refused.append(str(error))
    [error] = refused
    assert "/daft_img/" in error
    assert "for decoded pixels, encode them as JPEG or PNG" in error
