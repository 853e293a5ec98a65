"""What the benchmarks measure with: how images are packed, and which models there are."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from jobs.benchmarks import data as benchmark_data
from jobs.benchmarks.data import Dataset, load_subject, make_dataset, shard_count
from pipeline.config import ConfigError
from pipeline.read import NoShardsError
from tests.makers import make_image, make_tar


def packed(dataset: Dataset) -> list[tuple[str, bytes]]:
    found = []
    for path in sorted(dataset.tars.iterdir()):
        with tarfile.open(path) as tar:
            found += [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("samples", [1, 4, 5, 13])
def test_data_is_cut_or_repeated_to_an_exact_count(images: Path, tmp_path: Path, samples: int) -> None:
    dataset = make_dataset(str(images), tmp_path, samples, cores=2)
    members = packed(dataset)
    assert [name for name, _ in members] == [f"{i:09d}.png" for i in range(samples)]
    assert [data for _, data in members] == [make_image(i % 5, format="PNG") for i in range(samples)]
    assert (dataset.images, dataset.distinct) == (samples, min(samples, 5))
    assert dataset.shards == len(list(dataset.tars.iterdir())) == min(samples, 4)
    assert dataset.bytes == sum(len(data) for _, data in members)


def test_without_a_count_each_image_is_taken_once_but_for_those_that_are_none(
    images: Path, tmp_path: Path
) -> None:
    dataset = make_dataset(str(images), tmp_path, None, cores=1)
    assert (dataset.images, dataset.distinct, dataset.left_out, dataset.shards) == (5, 5, 1, 2)


@pytest.mark.parametrize(
    ("images", "size", "cores", "shards"),
    [
        (3, 300, 2, 3),  # no empty ones
        (20_000, 10_000_000, 2, 4),
        (100_000, 50_000_000, 2, 13),  # of 8,192 images at the most
        (10_000, 20_000_000_000, 2, 20),  # of 1 GB at the most
        (100_000, 11_000_000_000, 16, 32),
    ],
)
def test_shards_are_few_but_not_too_large_and_some_for_each_core(
    images: int, size: int, cores: int, shards: int
) -> None:
    assert shard_count(images, size, cores) == shards


def test_repeated_images_count_for_the_size_of_shards(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = max(len(make_image(i, format="PNG")) for i in range(5))
    monkeypatch.setattr(benchmark_data, "_SHARD_BYTES", 4 * each)
    assert make_dataset(str(images), tmp_path, 40, cores=1).shards == 10


def test_unpacked_images_are_the_same(images: Path, tmp_path: Path) -> None:
    dataset = make_dataset(str(images), tmp_path, 7, cores=1)
    dataset.unpack()
    assert {path.name: path.read_bytes() for path in dataset.files.iterdir()} == dict(packed(dataset))


def test_data_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(make_tar([("0.png", b"no image")]))
    with pytest.raises(NoShardsError, match="no image that can be decoded"):
        make_dataset(str(tmp_path), tmp_path, 10, cores=1)


def test_a_size_is_for_random_weights() -> None:
    with pytest.raises(ConfigError, match="fashion-mnist has a size of its own"):
        load_subject("fashion-mnist", 224)
