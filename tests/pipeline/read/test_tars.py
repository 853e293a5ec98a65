"""Compression, hard links, keys and image members of tars."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.config import InputConfig
from pipeline.read import ReadOptions, Sample, Shard, read_samples
from pipeline.read.samples import ShardError
from pipeline.storage import Storage
from tests.cases import case_input
from tests.makers import make_samples, make_tar
from tests.read_options import read_options


def read(root: Path, data: bytes, options: ReadOptions | None = None) -> list[Sample]:
    info = Storage().write(f"{root}/x.tar", data)
    shard = Shard(info.uri, info.version, "webdataset", info.size)
    return list(read_samples(Storage(), shard, options or ReadOptions()))


# Compression -------------------------------------------------------------------------------------


def _arrow(codec: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        out = pa.BufferOutputStream()
        with pa.CompressedOutputStream(out, codec) as stream:
            stream.write(data)
        return bytes(out.getvalue())

    return compress


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zstd": _arrow("zstd"),
    "lz4": _arrow("lz4"),
}
every_compression = pytest.mark.parametrize("name", COMPRESSORS)


@pytest.mark.parametrize(
    "name",
    ["good.tar", "x.tar.bz2", "x.tar.lz4", "x.tar.xz", "x.tar.zst", "x.tbz2", "zstd_inside.tar"],
)
def test_compression_is_detected_by_content_whatever_the_name(name: str) -> None:
    info = Storage().stat(str(case_input("tar-compressed") / name))
    shard = Shard(info.uri, info.version, "webdataset", info.size)
    [sample] = read_samples(Storage(), shard, ReadOptions())
    assert (sample.key, sample.target, sample.error) == ("a", None, None)
    assert sample.image is not None
    assert (sample.offset, sample.size) == ((512, len(sample.image)) if name == "good.tar" else (None, None))


@every_compression
def test_frames_of_parallel_compressors_are_one_tar(tmp_path: Path, name: str) -> None:
    data, compress = make_tar(make_samples(40)), COMPRESSORS[name]
    whole = read(tmp_path, data)
    parts = [compress(data[start : start + 10_000]) for start in range(0, len(data), 10_000)]
    assert read(tmp_path, b"".join(parts)) == whole
    if name == "zstd":  # pzstd writes the size of each frame in a skippable frame before the frame
        skippable = b"\x50\x2a\x4d\x18\x04\0\0\0size"
        assert read(tmp_path, b"".join(skippable + part for part in parts)) == whole


@every_compression
def test_compressed_tar_that_is_cut_off_is_refused(tmp_path: Path, name: str) -> None:
    data, compress = make_tar(make_samples(20)), COMPRESSORS[name]
    first, second = compress(data[:9_000]), compress(data[9_000:])
    assert len(read(tmp_path, first + second)) == 20
    cuts = {*range(0, len(first + second), 97), len(first), len(first) + 1, len(first + second) - 1}
    for cut in cuts:
        with pytest.raises(ShardError, match=r"cut off|not a tar|truncated") as caught:
            read(tmp_path, (first + second)[:cut])
        assert not caught.value.transient


@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_data_after_a_compressed_tar_is_not_ignored(tmp_path: Path, name: str) -> None:
    data = COMPRESSORS[name](make_tar(make_samples(2)))
    with pytest.raises(ShardError, match=r"damaged or cut off.*; compress the tar again"):
        read(tmp_path, data + b"trailing data")


@pytest.mark.parametrize("name", ["gzip", "bz2", "xz", "checked zstd", "checked lz4"])
def test_wrong_checksum_is_refused(tmp_path: Path, name: str) -> None:
    """Arrow writes zstd and lz4 without checksums: these frames have one stored block and a checksum."""
    good = make_tar({"a.jpg": random.Random(1).randbytes(5000)})
    if name == "checked zstd":  # XXH64 of the content
        block = (len(good) << 3 | 1).to_bytes(3, "little") + good
        data = b"\x28\xb5\x2f\xfd\x04\x58" + block + b"\0\0\0\0"
    elif name == "checked lz4":
        block = (len(good) | 1 << 31).to_bytes(4, "little") + good
        data = b"\x04\x22\x4d\x18\x64\x40\xa7" + block + bytes(4) + b"\0\0\0\0"
    else:
        data = COMPRESSORS[name](good)
        middle = len(data) // 2
        data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    with pytest.raises(ShardError, match=r"(?i)check|crc|corrupt|invalid"):
        read(tmp_path, data)


def test_windows_of_xz_and_zstd_are_limited(tmp_path: Path) -> None:
    """A small file may ask for gigabytes of memory."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1024**3, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3}]
    xz = lzma.compress(make_tar(make_samples(1)), filters=filters)
    zstd = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + b"\x0b\0\0A"  # a window of 2 GiB
    for data in (xz, lzma.compress(make_tar(make_samples(1))[:512]) + xz, zstd):
        with pytest.raises(ShardError, match=r"(?i)memory.*with a window of at most 128 MiB"):
            read(tmp_path, data)
    assert len(read(tmp_path, lzma.compress(make_tar(make_samples(3)), preset=9))) == 3


# Hard links --------------------------------------------------------------------------------------


def _linked_tar(kind: bytes, *links: tuple[str, str]) -> bytes:
    """Returns a tar with the sample `a` and links, each a name and the name of an earlier member."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in [("a.jpg", b"first"), ("a.cls", b"3")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return stream.getvalue()


LINKS = [("b.jpg", "a.jpg"), ("b.cls", "a.cls"), ("c.cls", "b.cls"), ("c.jpg", "a.jpg")]


def test_hard_link_has_the_content_of_the_earlier_member(tmp_path: Path) -> None:
    samples = read(tmp_path, _linked_tar(tarfile.LNKTYPE, *LINKS))
    assert samples == [Sample(key, b"first", 3) for key in "abc"]
    assert [(sample.offset, sample.size) for sample in samples] == [(512, 5)] * 3


def test_hard_links_are_read_from_object_storage(bucket: str) -> None:
    info = Storage().write(f"{bucket}/x.tar", _linked_tar(tarfile.LNKTYPE, *LINKS))
    samples = list(
        read_samples(Storage(), Shard(info.uri, info.version, "webdataset", info.size), ReadOptions())
    )
    assert samples == [Sample(key, b"first", 3) for key in "abc"]


def test_hard_link_that_cannot_be_read_names_cause_and_remedy(tmp_path: Path) -> None:
    data = _linked_tar(tarfile.LNKTYPE, *LINKS, ("d.jpg", "missing.jpg"))
    missing = read(tmp_path, data)[3].error or ""
    assert "'d.jpg' is a link to 'missing.jpg', not a regular file; hard links are read only to" in missing
    assert "create the tar with `tar --hard-dereference`" in missing
    plain, linked, *_ = read(tmp_path, gzip.compress(data))
    assert (plain.image, plain.target) == (b"first", 3)
    assert "'b.jpg' is a link to 'a.jpg'" in (linked.error or "")


def test_symbolic_link_is_an_error_row(tmp_path: Path) -> None:
    _, linked, _ = read(tmp_path, _linked_tar(tarfile.SYMTYPE, *LINKS))
    assert "'b.jpg' is a link to 'a.jpg', not a regular file" in (linked.error or "")


def test_position_of_each_image_is_that_of_its_bytes(tmp_path: Path) -> None:
    data = make_tar([("x" * 300 + ".jpg", b"1" * 700), ("a.txt", b""), ("b.jpg", b""), ("c.jpg", b"333")])
    samples = read(tmp_path, data)
    assert [sample.size for sample in samples] == [700, None, 0, 3]
    for sample in samples:
        if sample.offset is not None and sample.size is not None:
            assert data[sample.offset :][: sample.size] == sample.image


# Keys and images ---------------------------------------------------------------------------------


def keys(samples: list[Sample]) -> list[tuple[str, int | None, int]]:
    return [(sample.key, sample.target, sample.merged) for sample in samples]


def test_image_is_the_first_member_by_its_last_extension_and_others_are_counted(tmp_path: Path) -> None:
    data = (case_input("dots-in-names") / "names.tar").read_bytes()
    samples = read(tmp_path, data)
    assert keys(samples) == [("22", None, 1), ("a", None, 0), ("IMG_1", None, 1), ("plain", None, 0)]
    assert all(sample.error is None for sample in samples)


def test_each_image_is_a_sample_with_keys_up_to_the_last_dot(tmp_path: Path) -> None:
    data = (case_input("dots-in-names") / "names.tar").read_bytes()
    samples = read(tmp_path, data, read_options(key="last-dot"))
    others = [("IMG_1.left", None, 0), ("IMG_1.right", None, 0), ("plain", None, 0)]
    assert keys(samples) == [("22.05", None, 0), ("22.06", None, 0), ("a.b", 3, 0), *others]
    assert all(sample.error is None for sample in samples)


def test_image_member_chooses_the_image_of_a_sample(tmp_path: Path) -> None:
    members = [("1.left.jpg", b"l"), ("1.right.JPG", b"r"), ("1.cls", b"3"), ("2.left.jpg", b"l")]
    options = read_options(image_member="right.jpg")
    first, second = read(tmp_path, make_tar(members), options)
    assert (first.image, first.target, first.merged) == (b"r", 3, 0)
    assert "no member has the extension .right.jpg (input.image_member)" in (second.error or "")
    data = make_tar([("1.jpg", b"thumbnail"), ("1.raw", b"image")])
    assert [sample.image for sample in read(tmp_path, data, read_options(image_member="raw"))] == [b"image"]


@pytest.mark.parametrize("order", [1, -1])
def test_plain_extension_precedes_a_compound_one(tmp_path: Path, order: int) -> None:
    """A depth map or a mask before its image is not labeled, and neither is a link or a large image."""
    members = [("a.depth.png", b"d" * 9), ("a.jpg", b"image"), ("a.mask.png", b"m")][::order]
    [sample] = read(tmp_path, make_tar(members), read_options(max_image_bytes=5))
    assert (sample.image, sample.error, sample.merged) == (b"image", None, 2)


def test_settings_of_the_key_and_the_image_are_checked() -> None:
    assert InputConfig(uri="/x", image_member=".Left.JPG").image_member == "left.jpg"
    assert InputConfig(uri="/x", image_member="jpg", key="last-dot").image_member == "jpg"
    with pytest.raises(ValueError, match="an extension has no dot with key: last-dot"):
        InputConfig(uri="/x", image_member="left.jpg", key="last-dot")
