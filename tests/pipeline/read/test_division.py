"""Large files become several shards: parts of row groups, or byte ranges of a tar."""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path
from typing import ClassVar, NoReturn

import pytest

from pipeline.config import ConfigError
from pipeline.read import ReadOptions, Sample, Shard, divide_files, read_samples, whole_file
from pipeline.read.samples import ShardError
from pipeline.storage import Storage, StorageError
from tests.makers import list_shards, make_image, make_parquet, make_tar, make_tar_gz
from tests.read_options import read_options

Row = tuple[str, bytes | None, object, int | None]


def parts(path: Path | str, split_bytes: int | None, **options: str) -> list[Shard]:
    shards = list_shards(Storage(), str(path))
    return list(divide_files(Storage(), shards, split_bytes, **options))  # type: ignore[arg-type]


def rows(shards: list[Shard], options: ReadOptions | None = None) -> list[Row]:
    def row(sample: Sample) -> Row:
        return sample.key, sample.image, sample.target, sample.offset

    read = options or read_options(class_names=["x"] * 1000, label_column=None)
    return [row(sample) for shard in shards for sample in read_samples(Storage(), shard, read)]


def tar_of(members: list[tuple[str, bytes]], format: int, **pax: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format, pax_headers=pax) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if format == tarfile.PAX_FORMAT:
                info.pax_headers = {"comment": "x" * 700}
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def members(folder: str, count: int = 12) -> list[tuple[str, bytes]]:
    found = []
    for i in range(count):
        found += [(f"{folder}{i:03d}.jpg", make_image(i)), (f"{folder}{i:03d}.cls", b"%d" % i)]
        found += [(f"{folder}{i:03d}.txt", b"")]
    return found


TARS = {
    "ustar": tar_of(members(""), tarfile.USTAR_FORMAT),
    "gnu long names": tar_of(members("folder/" * 40 + "same start "), tarfile.GNU_FORMAT),
    "pax": tar_of(members("folder/" * 40), tarfile.PAX_FORMAT, comment="global"),
    "hidden members": tar_of(
        [m for i, each in enumerate(members("a/")) for m in [(f".{i}", b"?"), each]], tarfile.USTAR_FORMAT
    ),
    "large members": make_tar([(f"{i}.jpg", make_image(i) + bytes(9000)) for i in range(9)]),
}


def test_tar_of_too_many_parts_is_an_error_with_a_size_that_works(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(TARS["large members"])
    with pytest.raises(ConfigError, match=r"read\.split_bytes: 1 divides .*/x\.tar into more than") as caught:
        parts(path, 1)
    smallest = int(str(caught.value).rpartition(" ")[2])
    assert rows(parts(path, smallest)) == rows(parts(path, None))
    with pytest.raises(ConfigError):
        parts(path, smallest - 1)


@pytest.mark.parametrize("split_bytes", [512, 1000, 2048, 5000, 20_000, 10**9, None])
@pytest.mark.parametrize("name", TARS)
def test_parts_of_tar_have_every_sample_once(name: str, split_bytes: int | None, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(TARS[name])
    found = parts(path, split_bytes)
    assert rows(found) == rows(parts(path, None))
    assert sum(shard.size for shard in found) == path.stat().st_size
    if split_bytes and split_bytes <= 5000:
        assert len(found) > 2
        assert found[1].uri == f"{path}/bytes-{(found[1].span or (0,))[0]:012d}"
        assert {whole_file(shard.uri) for shard in found} == {str(path)}
    if split_bytes in (10**9, None):
        assert [shard.uri for shard in found] == [str(path)]


def test_part_starts_at_sample_of_configured_key(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(make_tar([(f"22.{i}.jpg", make_image(i)) for i in range(20)]))
    assert len(parts(path, 3000)) == 1
    found = parts(path, 3000, key="last-dot")
    assert len(found) > 3
    assert len(rows(found, read_options(key="last-dot"))) == 20


def test_compressed_and_damaged_files_are_not_divided(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(make_tar_gz(members("")))
    (tmp_path / "b.tar").write_bytes(b"?" * 5000)
    (tmp_path / "c.parquet").write_bytes(b"?" * 5000)
    (tmp_path / "d.tar").write_bytes(b"")
    assert [shard.span for shard in parts(tmp_path, 100)] == [None] * 4


class FailingStorage(Storage):
    opened: ClassVar[list[str]] = []

    def open_unbuffered(self, uri: str, version: str | None = None) -> NoReturn:
        self.opened.append(uri)
        time.sleep(0.02)
        raise StorageError(uri, "no connection")


def test_failure_of_one_file_ends_the_division() -> None:
    shards = [Shard(f"s3://b/{i}.tar", "v-9", "webdataset", 9 if i else 1) for i in range(200)]
    with pytest.raises(StorageError, match="no connection"):
        list(divide_files(FailingStorage(), iter(shards), 5))
    assert len(FailingStorage.opened) < 100


def test_wrong_start_of_part_makes_its_predecessor_unreadable(tmp_path: Path) -> None:
    inner = make_tar(members("inner", 30))
    path = tmp_path / "x.tar"
    path.write_bytes(make_tar([("a.jpg", make_image()), ("b.tar", inner), *members("z", 30)]))
    found = parts(path, len(inner) // 3)
    errors, keep = list[ShardError](), read_options(on_damaged_shard="keep")
    for shard in found:
        try:
            rows([shard], keep)
        except ShardError as error:
            errors.append(error)
    assert errors
    assert "set read.split_bytes to null" in str(errors[0])
    assert not any(error.keep for error in errors)
    assert len(rows(parts(path, None))) == 32


def test_parts_of_parquet_are_row_groups(tmp_path: Path) -> None:
    path, images = tmp_path / "x.parquet", [make_image(i) for i in range(20)]
    path.write_bytes(make_parquet({"image": images, "label": list(range(20))}, row_group_size=3))
    options = read_options(label_column="label", class_names=["x"] * 20)
    whole = rows(parts(path, None), options)
    assert [row[0] for row in whole] == [f"{i:09d}" for i in range(20)]
    for count in (2, 3, 7, 100):
        found = parts(path, path.stat().st_size // count)
        assert rows(found, options) == whole
        assert 1 < len(found) <= 7
        spans = [shard.span for shard in found]
        assert [shard.uri for shard in found] == [f"{path}/rows-{start:012d}" for start, _ in spans]  # type: ignore[misc]
        assert sum(shard.size for shard in found) == path.stat().st_size


def test_version_of_part_depends_on_its_end(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(make_parquet({"image": [make_image(i) for i in range(20)]}, row_group_size=5))
    two, four = parts(path, path.stat().st_size // 2), parts(path, path.stat().st_size // 4)
    assert two[0].uri == four[0].uri
    assert two[0].version != four[0].version
    assert two[0].object == four[0].object
    assert four == parts(path, path.stat().st_size // 4)


def test_file_that_storage_cannot_read_is_not_planned_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.parquet").write_bytes(make_parquet({"image": [make_image()] * 5}, row_group_size=1))

    def fail(*args: object) -> None:
        raise StorageError("x.parquet", "the service is down")

    monkeypatch.setattr(Storage, "open_unbuffered", fail)
    with pytest.raises(StorageError, match="the service is down"):
        parts(tmp_path, 100)


def test_parts_in_a_bucket_are_read_in_ranges(bucket: str) -> None:
    storage, tar = Storage(), TARS["pax"]
    storage.write(f"{bucket}/in/a.tar", tar)
    images = [make_image(i) for i in range(20)]
    storage.write(f"{bucket}/in/b.parquet", make_parquet({"image": images}, row_group_size=3))
    found = parts(f"{bucket}/in", 8000)
    assert len({shard.object.uri for shard in found}) == 2 < len(found)
    assert rows(found) == rows(parts(f"{bucket}/in", None))
