"""How images are packed."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from cvt.presets import preset_preprocessor
from jobs.benchmarks.inputs import make_dataset, unpack
from pipeline.read import NoShardsError
from tests.makers import make_image, make_tar

PREPROCESSOR = preset_preprocessor()


def packed(tars: Path) -> list[tuple[str, bytes]]:
    found = []
    for path in sorted(tars.iterdir()):
        with tarfile.open(path) as tar:
            found += [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize(("samples", "shards"), [(1, 1), (4, 4), (5, 3), (13, 4)])
def test_images_are_cut_or_repeated_to_an_exact_count(
    images: Path, tmp_path: Path, samples: int, shards: int
) -> None:
    tars = tmp_path / "tars"
    dataset = make_dataset(str(images), tars, PREPROCESSOR, samples, cores=2)
    members = packed(tars)
    assert [name for name, _ in members] == [f"{i:09d}.jpg" for i in range(samples)]
    assert [data for _, data in members] == [make_image(i % 5, format="PNG") for i in range(samples)]
    assert (dataset.images, dataset.distinct) == (samples, min(samples, 5))
    assert dataset.shards == len(list(tars.iterdir())) == shards
    assert dataset.bytes == sum(len(data) for _, data in members)


def test_images_that_cannot_be_decoded_are_left_out_and_counted(images: Path, tmp_path: Path) -> None:
    assert make_dataset(str(images), tmp_path / "tars", PREPROCESSOR, 10, cores=1).left_out == 1


@pytest.mark.slow
def test_tars_have_a_maximum_number_of_images(images: Path, tmp_path: Path) -> None:
    assert make_dataset(str(images), tmp_path / "tars", PREPROCESSOR, 20_000, cores=1).shards == 3


def test_unpacked_images_are_the_same(images: Path, tmp_path: Path) -> None:
    make_dataset(str(images), tmp_path / "tars", PREPROCESSOR, 7, cores=1)
    unpack(tmp_path / "tars", tmp_path / "files")
    files = {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}
    assert files == dict(packed(tmp_path / "tars"))


def test_shards_without_images_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.tar"
    source.write_bytes(make_tar([("0.png", b"no image")]))
    with pytest.raises(NoShardsError, match="no image that can be decoded"):
        make_dataset(str(source), tmp_path / "tars", PREPROCESSOR, 10, cores=1)
