"""Readers of WebDataset tars, Parquet files and image files, with valid and invalid input."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import pickle
import random
import re
import subprocess
import sys
import tarfile
import time
import tracemalloc
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.local_s3 import LocalS3
from pipeline.config import ReadConfig
from pipeline.read import (
    ReadOptions,
    Sample,
    Shard,
    downloads,
    parquet,
    read_samples,
    webdataset,
)
from pipeline.read.limits import Deadline
from pipeline.read.parquet_pages import ColumnChunkFile
from pipeline.read.samples import ShardError, UnreadableShardError
from pipeline.storage import ObjectInfo, Storage
from tests.makers import (
    category_of,
    list_shards,
    make_image,
    make_parquet,
    make_samples,
    make_tar,
    make_tar_gz,
)
from tests.read_options import read_options

PLAIN = ReadOptions()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return tmp_path


def shard_of(storage: Storage, uri: str, data: bytes, format: str = "auto") -> Shard:
    storage.write(uri, data)
    (shard,) = list_shards(storage, uri, format)
    return shard


def read(root: object, data: bytes, options: ReadOptions = PLAIN, name: str = "x.tar") -> list[Sample]:
    """Reads a shard, and checks that each error has a category."""
    storage = Storage()
    samples = list(read_samples(storage, shard_of(storage, f"{root}/{name}", data), options))
    for sample in samples:
        assert sample.error is None or category_of(sample.error)
    return samples


def one(root: object, data: bytes, options: ReadOptions = PLAIN, name: str = "x.tar") -> Sample:
    (sample,) = read(root, data, options, name)
    return sample


# WebDataset --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "make"), [("a.tar", make_tar), ("a.tar.gz", make_tar_gz), ("gzipped.tar", make_tar_gz)]
)
def test_tar_on_s3_yields_its_samples_in_order(storage: Storage, bucket: str, name: str, make: Any) -> None:
    shard = shard_of(storage, f"{bucket}/{name}", make(make_samples(30)))
    expected = [Sample(f"{i:05d}", make_image(i), i, None) for i in range(30)]
    assert list(read_samples(storage, shard, PLAIN)) == expected
    assert list(read_samples(storage, shard, PLAIN)) == expected


def test_photographs_are_read_unchanged(
    storage: Storage, bucket: str, photographs: list[tuple[str, bytes, int]]
) -> None:
    members = [
        member
        for key, jpeg, label in photographs[:20]
        for member in ((f"{key}.jpg", jpeg), (f"{key}.cls", str(label).encode()))
    ]
    shard = shard_of(storage, f"{bucket}/p.tar", make_tar(members))
    found = [(s.key, s.image, s.target) for s in read_samples(storage, shard, PLAIN)]
    assert found == photographs[:20]


@pytest.mark.parametrize(
    "kind",
    ["jpg", "JPEG", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "TIFF", "avif", "HEIC", "heif", "jxl"],
)
def test_every_image_extension_is_accepted(files: Path, kind: str) -> None:
    assert one(files, make_tar({f"k.{kind}": b"bytes"})).image == b"bytes"


def test_key_is_the_path_up_to_the_first_dot_of_the_name(files: Path) -> None:
    names = ["a.b/c.jpg", "./d.jpg", "../../etc/passwd.jpg", "/abs/e.jpg", "ü 日本.jpg", "a" * 300 + ".jpg"]
    keys = [sample.key for sample in read(files, make_tar([(name, b"i") for name in names]))]
    assert keys == ["a.b/c", "./d", "../../etc/passwd", "/abs/e", "ü 日本", "a" * 300]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_tar_format_is_read(files: Path, format: int) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format, pax_headers={"comment": "x"}) as tar:
        for name in ["folder/" + "n" * 90 + f"{i}.jpg" for i in range(3)]:
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(b"bytes"))
    samples = read(files, stream.getvalue())
    assert [sample.key for sample in samples] == ["folder/" + "n" * 90 + f"{i}" for i in range(3)]
    assert [sample.image for sample in samples] == [b"bytes"] * 3


def test_names_that_are_not_utf8_stay_distinct(files: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ["ä.jpg", "ö.jpg"]:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"i"))
    keys = [sample.key for sample in read(files, stream.getvalue())]
    assert keys == ["\\xe4", "\\xf6"]


def test_folders_and_hidden_members_are_skipped(files: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        folder = tarfile.TarInfo("train")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ["train/._a.jpg", "train/a.jpg", ".DS_Store", "__MACOSX/train/a.jpg", ".x/b.jpg"]:
            tar.addfile(tarfile.TarInfo(name))
    assert [sample.key for sample in read(files, stream.getvalue())] == ["train/a"]


def test_empty_tar_has_no_samples(files: Path) -> None:
    assert read(files, make_tar([])) == []


def test_first_image_of_a_sample_is_used(files: Path) -> None:
    sample = one(files, make_tar([("a.seg.png", b"mask"), ("a.jpg", b"first"), ("a.png", b"second")]))
    assert sample == Sample("a", b"first")


def test_members_that_are_not_adjacent_are_reported(files: Path) -> None:
    data = make_tar([("a.jpg", b"A"), ("b.jpg", b"B"), ("b.cls", b"1"), ("a.cls", b"0")])
    first, second, stray = read(files, data)
    assert (first, second) == (Sample("a", b"A"), Sample("b", b"B", 1))
    assert (stray.key, stray.image, stray.target) == ("a", None, None)
    assert stray.error is not None
    assert "members: .cls" in stray.error
    assert "adjacent" in stray.error


def test_duplicate_keys_are_separate_samples(files: Path) -> None:
    data = make_tar([("a.jpg", b"1"), ("a.jpg", b"2"), ("b.jpg", b"3"), ("a.jpg", b"4")])
    assert [(s.key, s.image) for s in read(files, data)] == [
        ("a", b"1"),
        ("a", b"2"),
        ("b", b"3"),
        ("a", b"4"),
    ]


def test_error_of_a_sample_without_image_names_its_members(files: Path) -> None:
    sample = one(files, make_tar([("a.svg", b"?"), ("a.cls", b"1"), ("a.json", b"{}")]))
    assert sample.image is None
    assert sample.target is None
    assert sample.error is not None
    assert sample.error.startswith("no image: no member has an image extension (members: .svg .cls .json)")


def test_error_of_a_link_names_its_target(files: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, kind in [("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    symbolic, hard = [sample.error or "" for sample in read(files, stream.getvalue())]
    assert "'a.jpg' is a link to '/etc/passwd'" in symbolic
    assert "'b.jpg' is a link to '/etc/passwd', not a regular file; hard links are read only to" in hard


def test_too_large_image_is_an_error_and_others_are_read(files: Path) -> None:
    data = make_tar([("a.jpg", bytes(1001)), ("a.cls", b"1"), ("b.jpg", bytes(1000))])
    large, small = read(files, data, read_options(max_image_bytes=1000))
    assert (
        large.error
        == "file too large: the image has 1001 bytes, more than the limit of 1000 (input.max_image_bytes)"
    )
    assert large.image is None
    assert small.image == bytes(1000)


def test_empty_image_is_passed_to_the_decoder(files: Path) -> None:
    assert one(files, make_tar({"a.jpg": b""})) == Sample("a", b"")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(Path(os.environ["BOMB"])),)


def test_pickles_are_never_loaded(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(files / "exploded"))
    bomb = pickle.dumps(Bomb())
    names = ["pyd", "pkl", "pickle", "pth", "cls", "json", "jpg"]
    data = make_tar([(f"a.{kind}", bomb) for kind in names])
    for options in (PLAIN, read_options(label_field="x")):
        assert read(files, data, options)[0].key == "a"
    assert not (files / "exploded").exists()
    pickle.loads(bomb)
    assert (files / "exploded").exists()  # proves that the pickle is harmful


# Damaged tars ------------------------------------------------------------------------------------


def test_truncated_tar_is_refused(storage: Storage, files: Path) -> None:
    data = make_tar(make_samples(3))
    end = data.rstrip(b"\0")
    last = (len(end) + 511) // 512 * 512  # end of the last member with its padding
    whole = read(files, data)
    cuts = sorted({cut + by for cut in range(0, last + 513, 512) for by in (-1, 0, 1, 100)})
    for cut in cuts:
        if not 0 <= cut < last + 512:
            continue
        with pytest.raises(ShardError, match=r"x\.tar: "):
            read(files, data[:cut])
    # With the first of the final zero blocks, the tar is complete.
    assert read(files, data[: last + 512]) == whole


def test_truncation_at_a_member_boundary_reports_the_last_key(files: Path) -> None:
    data = make_tar([("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")])
    with pytest.raises(ShardError, match=r"after 2 samples \(the last key was 'b'\).*truncated at byte 2048"):
        read(files, data[: 4 * 512])
    with pytest.raises(ShardError, match=r"truncated: the file ends within 'b\.jpg'"):
        read(files, data[: 3 * 512])


def test_damaged_header_is_refused(files: Path) -> None:
    data = make_tar([("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")])
    for offset in [*range(0, 148, 7), *range(156, 512, 17)]:
        damaged = bytearray(data)
        damaged[1024 + offset] ^= 0x41  # in the header of b.jpg
        with pytest.raises(ShardError, match=r"at byte 1024: bad checksum"):
            read(files, bytes(damaged))


def test_zero_block_in_the_middle_does_not_end_the_tar(files: Path) -> None:
    data = make_tar([("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")])
    with pytest.raises(ShardError, match="data follows the end"):
        read(files, data[:1024] + bytes(512) + data[1536:])
    with pytest.raises(ShardError, match="data follows the end"):
        read(files, data + data)


def test_member_of_negative_size_does_not_loop_forever(files: Path) -> None:
    info = tarfile.TarInfo("a.txt")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512 in base 256: the next header would be this one
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(ShardError, match="the tar is damaged: "):
        read(files, make_tar([("0.jpg", b"x")])[:1024] + bytes(header) + bytes(2048))


def extended(content: bytes, kind: bytes) -> bytes:
    """An extended header of a tar."""
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE])
def test_headers_of_a_member_have_a_limit_together(files: Path, kind: bytes) -> None:
    member = make_tar([("a.jpg", b"1")])
    [sample] = read(files, extended(b"n" * 1_000_000, kind) + member)
    assert (sample.error is None) == (kind != tarfile.GNUTYPE_LONGNAME)  # a long key
    for headers in ([extended(b"n" * 1_100_000, kind)], [extended(b"n" * 500_000, kind)] * 3):
        with pytest.raises(ShardError, match="the headers of the member at byte 0 have more than 1 MiB"):
            read(files, b"".join(headers) + member)


def test_global_headers_are_not_kept(files: Path) -> None:
    member = make_tar([("a.jpg", b"1")])[:1024]
    data = (extended(b"n" * 900_000, tarfile.XGLTYPE) + member) * 5 + bytes(1024)
    assert read(files, data) == [Sample("a", b"1")] * 5


@pytest.mark.parametrize(
    "records", [b"2 " * 500_000 + b"=", b"1" * 1_000_000, b"5 a=b", b"0 a=b\n", b"99 a=b\n", b"6 ab=\n6 ab\n"]
)
def test_invalid_pax_record_is_refused_at_once(files: Path, records: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(ShardError, match=r"damaged"):
        read(files, extended(records, tarfile.XHDTYPE) + make_tar([("a.jpg", b"1")]))
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(("size", "shown"), [(b"1e3", "'1e3'"), (b"-5", "'-5'"), (b"9" * 99, "'9999")])
def test_pax_size_that_is_no_size_is_refused(files: Path, size: bytes, shown: str) -> None:
    record = b"%d size=%s\n" % (len(size) + 9 + (len(size) > 90), size)
    data = extended(record, tarfile.XHDTYPE) + make_tar([("a.jpg", b"1")])
    cause = f"the tar is damaged: the size of the member at byte 0 is {shown}.*; create the tar again"
    with pytest.raises(ShardError, match=cause):
        read(files, data)


def test_pax_size_and_names_replace_those_of_the_header(files: Path) -> None:
    records = b"12 size=700\n20 path=long/\xc3\xbc.jpg\n18 comment=a\nb=cd\n" + bytes(20)  # some writers pad
    member = tarfile.TarInfo("short.jpg").tobuf(tarfile.GNU_FORMAT) + b"x" * 700 + bytes(324)
    assert read(files, extended(records, tarfile.XHDTYPE) + member + bytes(1024)) == [
        Sample("long/ü", b"x" * 700)
    ]


def test_sparse_member_is_an_error_row(files: Path) -> None:
    records = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.name=a.jpg\n"
    pax = extended(records, tarfile.XHDTYPE) + make_tar([("GNUSparse/a.jpg", b"1")])[:1024]
    header = bytearray(tarfile.TarInfo("b.jpg").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[482] = tarfile.GNUTYPE_SPARSE, 1  # a block with more of the map follows
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    old = bytes(header) + bytes(512)
    samples = read(files, pax + old + make_tar([("c.jpg", b"3")]))
    assert [sample.key for sample in samples] == ["a", "b", "c"]
    assert [(sample.error or "")[:16] for sample in samples] == ["unreadable image"] * 2 + [""]


def test_truncated_gzip_is_refused(files: Path) -> None:
    data = make_tar_gz(make_samples(3))
    for cut in [*range(0, len(data), 41), *range(len(data) - 9, len(data))]:
        with pytest.raises(ShardError, match=r"x\.tar\.gz: "):
            read(files, data[:cut], name="x.tar.gz")


def test_damaged_gzip_is_refused(files: Path) -> None:
    data = gzip.compress(random.Random(1).randbytes(100_000) + make_tar(make_samples(1)))
    for offset in range(len(data) // 2, len(data), len(data) // 16):
        damaged = bytearray(data)
        damaged[offset] ^= 0x55
        with pytest.raises(ShardError):
            read(files, bytes(damaged), name="x.tar.gz")
    good = make_tar_gz(make_samples(3))
    with pytest.raises(ShardError, match="incorrect data check"):
        read(files, good[:-8] + b"\0\0\0\0" + good[-4:], name="x.tar.gz")


@pytest.mark.parametrize("data", [b"", b"not a tar", b"x" * 5000, make_image(1), b"BZh9" + bytes(900)])
def test_other_files_are_refused_as_tars(files: Path, data: bytes) -> None:
    problem = "the first header is invalid" if data else "it is empty"
    with pytest.raises(ShardError, match=rf"x\.tar: not a tar \(uncompressed, .*, bzip2.*\): {problem}"):
        read(files, data)


def test_random_damage_never_loses_a_sample_silently(files: Path) -> None:
    data = make_tar([(f"{i}.jpg", bytes([i]) * 600) for i in range(6)])
    choose = random.Random(5)
    for _ in range(150):
        damaged = bytearray(data)
        damaged[choose.randrange(6 * 1536)] ^= 1 << choose.randrange(8)
        try:
            assert len(read(files, bytes(damaged))) == 6
        except ShardError:
            continue


# Labels ------------------------------------------------------------------------------------------

CLASSES = ["cat", "dog", "7", *(f"class {i}" for i in range(3, 10))]
NAMED = read_options(class_names=CLASSES)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("0", 0),
        (" 9\n", 9),
        ("dog", 1),
        ("dog\n", 1),
        ("-1", None),
        ("7", 2),  # a name
        ("007", 7),
        ("3.0", 3),
        ("\ufeff3\r\n", 3),
    ],
)
def test_cls_is_a_class_index_or_a_class_name(files: Path, text: str, target: int | None) -> None:
    sample = one(files, make_tar({"a.jpg": b"image", "a.cls": text.encode()}), NAMED)
    assert sample == Sample("a", b"image", target)


@pytest.mark.parametrize("text", ["10", "-2", "bird", "", "1.5", "²", "\x01", "9" * 400])
def test_label_that_is_no_class_is_unmatched_and_keeps_the_image(files: Path, text: str) -> None:
    data = make_tar({"a.cls": text.encode(), "a.jpg": b"image"})
    sample = one(files, data, NAMED)
    assert sample == Sample("a", b"image", None, None, sample.unmatched)
    assert sample.unmatched is not None
    assert repr(text)[:20] in sample.unmatched or text in sample.unmatched
    assert one(files, data, read_options(labels=False)) == Sample("a", b"image")


def test_name_of_several_classes_is_no_label(files: Path) -> None:
    options = read_options(class_names=["crane", "dog", "crane"])
    members = {"a.jpg": b"1", "a.cls": b"crane", "b.jpg": b"2", "b.cls": b"2"}
    first, second = read(files, make_tar(members), options)
    assert (first.target, first.unmatched) == (None, "'crane' is the name of several classes of the model")
    assert second.target == 2


def test_label_that_is_not_text_is_unmatched(files: Path) -> None:
    sample = one(files, make_tar({"a.jpg": b"image", "a.cls": b"\xff\xfe"}))
    assert sample == Sample("a", b"image", unmatched=sample.unmatched)
    assert (sample.unmatched or "").startswith("the .cls member cannot be read: ")


def test_label_that_is_too_large_or_a_link_is_unmatched(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "_MAX_LABEL_BYTES", 100)
    sample = one(files, make_tar({"a.jpg": b"image", "a.cls": bytes(101)}))
    problem = "the .cls member cannot be read: it has 101 bytes, more than the limit of 100"
    assert sample == Sample("a", b"image", unmatched=problem)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        link = tarfile.TarInfo("a.cls")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        image = tarfile.TarInfo("a.jpg")
        image.size = 5
        tar.addfile(image, io.BytesIO(b"image"))
    problem = "the .cls member cannot be read: 'a.cls' is a link to '/etc/passwd', not a regular file"
    assert one(files, stream.getvalue()) == Sample("a", b"image", unmatched=problem)


@pytest.mark.parametrize(
    ("value", "target"),
    [(3, 3), ("dog", 1), ("7", 2), ("8", 8), (None, None), (-1, None), (4.0, 4)],
)
def test_json_field_can_be_the_label(files: Path, value: object, target: int | None) -> None:
    members = {
        "a.jpg": b"image",
        "a.json": json.dumps({"meta": {"label": value}}).encode(),
        "a.cls": b"5",  # not configured
    }
    options = read_options(label_field="meta.label", class_names=CLASSES)
    assert one(files, make_tar(members), options) == Sample("a", b"image", target)


@pytest.mark.parametrize("text", ["{}", '{"meta": 3}', '{"meta": {"x": 1}}', "[1]", "null"])
def test_json_without_the_field_has_no_label(files: Path, text: str) -> None:
    data = make_tar({"a.jpg": b"image", "a.json": text.encode()})
    assert one(files, data, read_options(label_field="meta.label")) == Sample("a", b"image", None)


@pytest.mark.parametrize("value", ["true", "[1]", '"bird"', "1.5", "10", "1e300", '"\\ud800"'])
def test_label_in_json_that_is_no_class_is_unmatched(files: Path, value: str) -> None:
    data = make_tar({"a.jpg": b"image", "a.json": f'{{"y": {value}}}'.encode()})
    options = read_options(label_field="y", class_names=CLASSES)
    sample = one(files, data, options)
    assert (sample.image, sample.target, sample.error) == (b"image", None, None)
    assert sample.unmatched is not None
    sample.unmatched.encode()  # can be stored in Arrow


@pytest.mark.parametrize("text", [b"{", b"", b"\xff", b"[" * 100_000])
def test_label_in_malformed_json_is_unmatched(files: Path, text: bytes) -> None:
    data = make_tar({"a.jpg": b"image", "a.json": text})
    sample = one(files, data, read_options(label_field="y"))
    assert (sample.image, sample.error) == (b"image", None)
    assert (sample.unmatched or "").startswith("the .json member cannot be read: ")
    assert one(files, data) == Sample("a", b"image")  # not read unless configured


# Parquet -----------------------------------------------------------------------------------------

IMAGES = [make_image(i) for i in range(40)]


def test_binary_columns_and_hugging_face_structs_are_read(storage: Storage, bucket: str) -> None:
    columns: dict[str, Any] = {
        "binary": pa.array(IMAGES, pa.binary()),
        "large": pa.array(IMAGES, pa.large_binary()),
        "struct": pa.array([{"bytes": image, "path": None} for image in IMAGES]),
    }
    for name, column in columns.items():
        data = make_parquet({"image": column, "y": list(range(40))}, row_group_size=7)
        shard = shard_of(storage, f"{bucket}/{name}.parquet", data)
        samples = list(read_samples(storage, shard, read_options(label_column="y")))
        assert samples == [Sample(f"{i:09d}", IMAGES[i], i) for i in range(40)]


def test_key_is_a_column_or_the_path_or_the_row_number(files: Path) -> None:
    data = make_parquet(
        {
            "image": [{"bytes": b"i", "path": path} for path in ("cat/1.jpg", None, "cat/1.jpg")],
            "id": [7, 8, None],
        }
    )
    keys = [sample.key for sample in read(files, data, name="x.parquet")]
    assert keys == ["cat/1.jpg", "000000001", "cat/1.jpg"]
    keys = [s.key for s in read(files, data, read_options(key_column="id"), name="x.parquet")]
    assert keys == ["7", "8", "000000002"]


def test_image_column_is_found_by_name_and_then_by_type(files: Path) -> None:
    both = {"image": [b"image"], "thumbnail": [b"small"]}
    assert one(files, make_parquet(both), name="x.parquet").image == b"image"
    options = read_options(image_column="thumbnail")
    assert one(files, make_parquet(both), options, "x.parquet").image == b"small"
    only = {"image": ["name.jpg"], "jpeg": [b"image"], "n": [1]}
    assert one(files, make_parquet(only), name="x.parquet").image == b"image"


@pytest.mark.parametrize(
    ("columns", "options", "cause"),
    [
        ({"a": [b"1"], "b": [b"2"]}, PLAIN, r"more than one column has an image type"),
        ({"a": ["x"], "b": [1]}, PLAIN, r"no column has an image type: .* set input\.format: table"),
        ({"a": ["x"], "b": [1]}, read_options(image_column="a"), r"column 'a' is string, neither binary"),
        ({"a": ["x"], "b": [b"1"]}, read_options(image_column="z"), "no column 'z'; set input.image_column"),
        ({"a": ["x"], "b": [b"1"]}, read_options(label_column="z"), "no column 'z'; set input.label_column"),
        ({"a": ["x"], "b": [b"1"]}, read_options(key_column="z"), "no column 'z'; set input.key_column"),
    ],
)
def test_error_of_a_missing_column_lists_the_columns(
    files: Path, columns: dict[str, Any], options: ReadOptions, cause: str
) -> None:
    with pytest.raises(ShardError, match=rf"x\.parquet: .*{cause}.*columns: a \(") as caught:
        read(files, make_parquet(columns), options, "x.parquet")
    assert "b (" in str(caught.value)


@pytest.mark.parametrize("options", [PLAIN, read_options(image_column="image")])
def test_two_image_columns_of_one_name_are_refused(files: Path, options: ReadOptions) -> None:
    stream = io.BytesIO()
    pq.write_table(pa.table([[b"1"], [b"2"]], names=["image", "image"]), stream)
    cause = (
        "2 columns are named 'image'; rename one, or set input.image_column; columns: image (binary), image"
    )
    with pytest.raises(ShardError, match=re.escape(cause)):
        read(files, stream.getvalue(), options, "x.parquet")


@pytest.mark.parametrize(
    ("columns", "path"),
    [
        ({"image": [{"bytes": b"i"}], "image.bytes": [b"i"]}, "image.bytes"),
        ({"image": [b"i"], "image.width": [1]}, "image"),
        ({"image": [b"i"], "y": [{"a": 1}], "y.a": [1]}, "y.a"),
    ],
)
def test_columns_whose_paths_are_the_same_are_refused(
    files: Path, columns: dict[str, Any], path: str
) -> None:
    options = read_options(image_column="image", label_column="y" if "y" in columns else None)
    cause = f"x.parquet: several columns are named '{path}' or '{path}.*'; rename one"
    with pytest.raises(ShardError, match=re.escape(cause)):
        read(files, make_parquet(columns), options, "x.parquet")


def test_empty_row_groups_take_no_time(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema, stream = pa.schema({"image": pa.binary()}), io.BytesIO()
    with pq.ParquetWriter(stream, schema, use_dictionary=False) as writer:
        for _ in range(50):
            writer.write_table(schema.empty_table())
    clock = SimpleNamespace(monotonic=itertools.count().__next__)
    monkeypatch.setattr("pipeline.read.limits.time", clock)
    assert read(files, stream.getvalue(), read_options(timeout_s=30), "x.parquet") == []


@pytest.mark.parametrize("column", ["image", "y"])
def test_columns_of_different_lengths_are_refused(files: Path, column: str) -> None:
    columns = {"image": [b"i"] * 4, "y": [0] * 4}
    data = make_parquet(columns, use_dictionary=False, compression="none", row_group_size=2)
    options = read_options(label_column="y", class_names=CLASSES)
    assert len(read(files, data, options, "x.parquet")) == 4
    # In the first row group, the only page of the column has one value instead of two.
    pages = [found.start(1) for found in re.finditer(rb"\x15\0\x15.\x15.\x2c\x15(\x04)\x15\0", data)]
    assert len(pages) == 4
    damaged = bytearray(data)
    damaged[pages[list(columns).index(column)]] = 2
    cause = rf"after 1 sample .*: column '{column}' of row group 0 has 1 rows, .* footer .* states 2"
    with pytest.raises(ShardError, match=cause):
        read(files, bytes(damaged), options, "x.parquet")


def test_file_with_fewer_rows_than_its_footer_states_is_refused(files: Path) -> None:
    data = make_parquet({"image": [b"i"] * 4}, use_dictionary=False, compression="none")
    damaged = bytearray(data)
    damaged[re.search(rb"\x15\0\x15.\x15.\x2c\x15(\x08)\x15\0", data).start(1)] = 4  # type: ignore[union-attr]
    with pytest.raises(
        ShardError, match="has 2 rows, but the footer of the file states 4: write the file again"
    ):
        read(files, bytes(damaged), name="x.parquet")


def test_label_with_an_unknown_time_zone_is_no_class(files: Path) -> None:
    data = make_parquet({"image": [b"i"], "y": pa.array([0], pa.timestamp("us", tz="Mars/Olympus"))})
    sample = one(files, data, read_options(label_column="y"), "x.parquet")
    assert "datetime.datetime(1970, 1, 1, 0, 0, " in (sample.unmatched or "")
    assert "is not a class of the model" in (sample.unmatched or "")


@pytest.mark.parametrize("role", ["image", "key", "label", "path"])
def test_rows_that_refer_to_one_long_value_have_a_limit_together(
    files: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    monkeypatch.setattr(parquet, "_MAX_REJECTED_BYTES", 2_000_000)
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 50, pa.int32()), pa.array([bytes(200_000)]))
    images = pa.array([b"i"] * 50)
    columns: dict[str, Any] = {
        "path": {"image": pa.StructArray.from_arrays([images, long.cast(pa.binary())], ["bytes", "path"])},
        "image": {"image": long.cast(pa.binary())},
    }.get(role, {"image": images, role: long})
    options = read_options(
        max_image_bytes=100_000,
        key_column="key" if role == "key" else None,
        label_column="label" if role == "label" else None,
    )
    name = {"path": "image.path"}.get(role, role)
    setting = {"image": "max_image_bytes", "path": "key_column"}.get(role, f"{role}_column")
    cause = (
        rf"x\.parquet: after 1\d samples .*column '{name}' has too many long values.*change input\.{setting}"
    )
    with pytest.raises(ShardError, match=cause):
        read(files, make_parquet(columns), options, "x.parquet")
    plain = make_parquet(columns, use_dictionary=False, compression="none")
    assert len(read(files, plain, options, "x.parquet")) == 50  # the file has the bytes


def test_other_values_of_a_dictionary_cost_nothing(files: Path) -> None:
    values = pa.array(["x" * 10**6, "dog"])
    labels = pa.DictionaryArray.from_arrays(pa.array([1] * 1000, pa.int32()), values)
    data = make_parquet({"image": [b"i"] * 1000, "y": labels})
    options = read_options(label_column="y", class_names=CLASSES)
    samples = read(files, data, options, "x.parquet")
    assert [sample.target for sample in samples] == [CLASSES.index("dog")] * 1000


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_samples_of_a_shard_have_a_limit(files: Path, name: str) -> None:
    images = [b"1", b"2", b"3"]
    data = make_parquet({"image": images})
    if name == "x.tar":
        data = make_tar([(f"{i}.jpg", image) for i, image in enumerate(images)])
    assert len(read(files, data, read_options(max_shard_samples=3), name)) == 3
    cause = r"more than 2 samples \(read\.max_shard_samples\); split the shard, lower read"
    shard = shard_of(Storage(), f"{files}/{name}", data)
    samples = read_samples(Storage(), shard, read_options(max_shard_samples=2))
    if name == "x.tar":  # a Parquet file states its number of rows
        assert [next(samples).image, next(samples).image] == [b"1", b"2"]
    with pytest.raises(ShardError, match=cause) as caught:
        next(samples)
    assert not caught.value.transient


def test_labels_can_be_integers_names_or_null(files: Path) -> None:
    labels: list[Any] = [
        pa.array([3, -1, None, 10], pa.int64()),
        pa.array(["dog", "-1", None, "bird"]),
        pa.array(["dog", "-1", None, "bird"]).dictionary_encode(),
        pa.array([3.0, float("nan"), None, 1.5]),
    ]
    for column in labels:
        data = make_parquet({"image": [b"i"] * 4, "y": column})
        options = read_options(label_column="y", class_names=CLASSES)
        *good, bad = read(files, data, options, "x.parquet")
        assert [sample.target is None for sample in good] == [False, True, True]
        assert [sample.unmatched for sample in good] == [None] * 3
        assert (bad.image, bad.target, bad.error) == (b"i", None, None)
        assert bad.unmatched is not None


def test_nested_label_is_unmatched_and_keeps_the_image(files: Path) -> None:
    data = make_parquet({"image": [b"i", b"j"], "y": [{"a": 1, "b": 2}, None]}, use_dictionary=False)
    first, second = read(files, data, read_options(label_column="y"), "x.parquet")
    assert (first.image, first.target) == (b"i", None)
    assert (first.unmatched or "").startswith("the label cannot be read: the type is struct")
    assert second == Sample("000000001", b"j")


def test_ignored_labels_are_not_read(files: Path) -> None:
    data = make_parquet({"image": [b"i"], "y": ["bird"]})
    options = read_options(labels=False, label_column="y", class_names=CLASSES)
    assert one(files, data, options, "x.parquet") == Sample("000000000", b"i")


def test_rows_without_bytes_or_with_too_many_bytes_are_errors(files: Path) -> None:
    rows = [{"bytes": None, "path": "a"}, None, {"bytes": b"12345", "path": "c"}, {"bytes": b"1"}]
    data = make_parquet({"image": rows})
    samples = read(files, data, read_options(max_image_bytes=4), "x.parquet")
    assert [sample.key for sample in samples] == ["a", "000000001", "c", "000000003"]
    assert [sample.image for sample in samples] == [None, None, None, b"1"]
    message = "no image: the row has no image bytes (input.format: table reads images by path or URI)"
    assert samples[0].error == samples[1].error == message
    assert "5 bytes, more than the limit of 4" in (samples[2].error or "")


def invalid_text(values: list[bytes]) -> pa.Array:
    """A column of strings whose bytes are not checked."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def test_label_that_cannot_be_converted_costs_only_its_target(files: Path) -> None:
    columns = {
        "text": invalid_text([b"dog", b"\xff\xfe", b"cat"]),
        "date": pa.array([None, 2**31 - 1, None], pa.date32()),
        "long": pa.array(["dog", "dog" * 10**6, "cat"]),
        "list": pa.array([None, [1] * 10**5, None]),
        "decimal": pa.array([Decimal("1.0"), Decimal("0.5"), Decimal("0.0")]),
        "large": pa.array([Decimal(1), Decimal(10**30), Decimal(0)]),
        "float": pa.array([1.0, float("inf"), 0.0]),
    }
    for name, column in columns.items():
        data = make_parquet({"image": [b"i"] * 3, "y": column})
        options = read_options(label_column="y", class_names=CLASSES)
        first, bad, last = read(files, data, options, "x.parquet")
        assert (bad.image, bad.target, bad.error) == (b"i", None, None), name
        assert bad.unmatched, name
        assert len(bad.unmatched) <= 200
        assert first.unmatched is last.unmatched is None
        assert (first.target, last.target) == ((None, None) if name in ("date", "list") else (1, 0))


def test_key_that_cannot_be_converted_costs_only_its_row(files: Path) -> None:
    columns = {
        "date": pa.array([1, 2**31 - 1, None], pa.date32()),
        "struct": pa.array([None, {"a": 1}, None]),
    }
    for column in columns.values():
        data = make_parquet({"image": [b"i"] * 3, "k": column})
        _, bad, last = read(files, data, read_options(key_column="k"), "x.parquet")
        assert (bad.key, bad.image) == ("000000001", None)
        assert (bad.error or "").startswith("invalid key: the key cannot be read: ")
        assert last == Sample("000000002", b"i")


def test_text_that_is_not_utf8_is_a_distinct_key(files: Path) -> None:
    paths = invalid_text([b"\xe4.jpg", b"\xf6.jpg"])
    image = pa.StructArray.from_arrays([pa.array([b"i", b"j"]), paths], ["bytes", "path"])
    for data, options in (
        (make_parquet({"image": image}), PLAIN),
        (make_parquet({"image": [b"i", b"j"], "k": paths}), read_options(key_column="k")),
    ):
        samples = read(files, data, options, "x.parquet")
        assert samples == [Sample("\\xe4.jpg", b"i"), Sample("\\xf6.jpg", b"j")]


def test_long_key_is_shortened_and_stays_distinct(files: Path) -> None:
    keys = ["a/" + "k" * 4094, "a/" + "k" * 4095, "a/" + "k" * 4096, "ü" * 3000, "ü" * 3001]
    data = make_parquet({"image": [b"i"] * 5, "k": keys})
    for samples in (
        read(files, make_tar([(f"{key}.jpg", b"i") for key in keys])),
        read(files, data, read_options(key_column="k"), "x.parquet"),
    ):
        assert samples[0] == Sample(keys[0], b"i")
        for sample, key in zip(samples[1:], keys[1:], strict=True):
            assert sample.error == "invalid key: the key has more than 4096 bytes"
            assert sample.image is None
            assert sample.key.startswith(key[:400] + key[400:500])
            assert len(sample.key.encode()) < 1100
        assert len({sample.key for sample in samples}) == 5


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_every_layout_of_pages_is_read(
    version: str, compression: str, use_dictionary: bool, monkeypatch: pytest.MonkeyPatch, files: Path
) -> None:
    """Small buffers cut the headers of pages; long statistics make headers longer than a buffer."""
    monkeypatch.setattr(parquet, "_IMAGE_BUFFER_BYTES", 64)
    monkeypatch.setattr(parquet, "_BUFFER_BYTES", 64)
    rows = [{"bytes": image, "path": f"{i}" * (1 if i % 9 else 500)} for i, image in enumerate(IMAGES)]
    options: dict[str, Any] = {"compression": compression, "use_dictionary": use_dictionary}
    options |= {"data_page_version": version, "write_page_checksum": True, "write_batch_size": 4}
    data = make_parquet(
        {"image": rows, "y": list(range(40))}, row_group_size=17, data_page_size=2000, **options
    )
    samples = read(files, data, read_options(label_column="y"), "x.parquet")
    assert samples == [Sample(row["path"], row["bytes"], i) for i, row in enumerate(rows)]


def test_page_over_the_limit_is_refused(files: Path) -> None:
    small, large = {"image": [b"i"] * 3}, {"image": [b"i", bytes(10**6), b"i"]}
    options = read_options(max_page_bytes=10**6)
    assert len(read(files, make_parquet(small), options, "x.parquet")) == 3
    for use_dictionary in (True, False):
        data = make_parquet(large, use_dictionary=use_dictionary, compression="zstd")
        with pytest.raises(ShardError, match=r"a page of column 'image' has 10000\d\d bytes, more than"):
            read(files, data, options, "x.parquet")
    keys = make_parquet({"image": [b"i"], "k": ["k" * 10**6], "other": ["o" * 10**6]})
    with pytest.raises(ShardError, match=r"raise read\.max_page_bytes"):
        read(files, keys, read_options(max_page_bytes=10**6, key_column="k"), "x.parquet")
    assert read(files, keys, options, "x.parquet") == [Sample("000000000", b"i")]  # not read


def test_footer_over_the_limit_is_refused(files: Path) -> None:
    table, stream = pa.table({"image": [b"i"]}), io.BytesIO()
    with pq.ParquetWriter(stream, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"large": "x" * 16 * 1024**2})
    with pytest.raises(ShardError, match=r"the footer has \d+ bytes, more than the limit of 16777216"):
        read(files, stream.getvalue(), name="x.parquet")


def page_header(size: int, values: int, minimum: bytes = b"") -> bytes:
    """The header of a page with statistics, in Thrift's compact protocol."""

    def number(value: int) -> bytes:
        digits = b""
        while value > 127:
            digits, value = digits + bytes([value & 127 | 128]), value >> 7
        return digits + bytes([value])

    sizes = b"\x15" + number(2 * size)
    statistics = b"\x18" + number(len(minimum)) + minimum + b"\0"
    page = b"\x15" + number(2 * values) + b"\x15\0\x15\6\x15\6" + b"\x1c" + statistics + b"\0"
    return b"\x15\0" + sizes + sizes + b"\x2c" + page + b"\0"


def read_pages(data: bytes, max_page_bytes: int) -> None:
    file = ColumnChunkFile(io.BytesIO(data), Deadline(60), max_page_bytes, "image")
    while file.read(1024**2):
        pass


def test_page_header_may_contain_whole_images_as_statistics() -> None:
    first = page_header(8, 1, bytes(3_000_000)) + bytes(8)
    with pytest.raises(UnreadableShardError, match="a page of column 'image' has 1001 bytes"):
        read_pages(first + page_header(1001, 1), 1000)
    with pytest.raises(UnreadableShardError, match="the header of a page of column 'image' is too large"):
        read_pages(page_header(8, 1, bytes(18_000_000)), 1000)


def test_damaged_page_header_is_reported_as_such() -> None:
    header, causes = page_header(8, 1, b"min"), set()
    for position in range(len(header)):
        for value in range(256):
            damaged = bytearray(header + bytes(8))
            damaged[position] = value
            try:
                read_pages(bytes(damaged), 1000)
            except UnreadableShardError as error:
                causes.add(re.sub(r"\d+ bytes.*", "", str(error)))
    assert causes == {"the header of a page of column 'image' is invalid", "a page of column 'image' has "}
    with pytest.raises(UnreadableShardError, match="the header of a page of column 'image' is invalid"):
        read_pages(b"\x1c" * 10_000, 1000)


def test_largest_page_that_arrow_reads_is_allowed_by_default() -> None:
    read_pages(page_header(2**31 - 1, 1024), ReadConfig().max_page_bytes)


def test_lack_of_memory_may_pass(files: Path) -> None:
    class Full(Storage):
        def open(self, *_: Any) -> Any:
            raise MemoryError

    shard = shard_of(Full(), f"{files}/x.tar", make_tar([("a.jpg", b"1")]))
    with pytest.raises(ShardError) as caught:
        list(read_samples(Full(), shard, PLAIN))
    assert caught.value.transient


def test_damaged_parquet_is_refused(files: Path) -> None:
    data = make_parquet({"image": IMAGES}, write_page_checksum=True, compression="none")
    for bad in (b"", b"PAR1", b"no parquet at all", data[:-1], data[: len(data) // 2]):
        with pytest.raises(ShardError, match=r"x\.parquet: damaged, or not in the format parquet"):
            read(files, bad, name="x.parquet")
    with pytest.raises(ShardError, match=r"x\.parquet: the header of a page of column 'image' is invalid"):
        read(files, data[100:], name="x.parquet")
    damaged = bytearray(data)
    damaged[len(data) // 3] ^= 1
    with pytest.raises(ShardError):
        read(files, bytes(damaged), name="x.parquet")


# Image files -------------------------------------------------------------------------------------


def test_image_files_are_read_in_order_with_names_as_keys(storage: Storage, bucket: str) -> None:
    names = [f"{i % 3}/{i:03d}.jpg" for i in range(50)]
    for i, name in enumerate(names):
        storage.write(f"{bucket}/in/{name}", make_image(i))
    (shard,) = list_shards(storage, f"{bucket}/in")
    samples = list(read_samples(storage, shard, PLAIN))
    assert [sample.key for sample in samples] == sorted(names)
    assert [s.image for s in samples] == [make_image(names.index(s.key)) for s in samples]
    assert list(read_samples(storage, shard, PLAIN)) == samples


def test_large_image_files_are_fetched_one_at_a_time(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pending, most = set[str](), 0

    class Counting(Storage):
        def read(self, uri: str, version: str | None = None, max_bytes: int = 100) -> bytes:
            nonlocal most
            pending.add(uri)
            most = max(most, len(pending))
            return super().read(uri, version, max_bytes)

    for i in range(80):
        Storage().write(f"{files}/{i:02d}.jpg", bytes(100))
    (shard,) = list_shards(Storage(), str(files))
    for limit, expected in ((100, 1), (350, 3), (10**6, 128)):
        monkeypatch.setattr(downloads, "_MAX_PENDING_BYTES", limit)
        most = 0
        for sample in read_samples(Counting(), shard, PLAIN):
            pending.discard(f"{files}/{sample.key}")
        assert most <= expected
        assert sample.key == "79.jpg"


def test_image_file_deleted_or_changed_after_listing_is_an_error(
    storage: Storage, bucket: str, s3_server: LocalS3
) -> None:
    for name in ("a", "b", "c", "d"):
        storage.write(f"{bucket}/{name}.jpg", name.encode() * (99 if name == "d" else 3))
    (shard,) = list_shards(storage, bucket)
    storage.write(f"{bucket}/a.jpg", b"new")
    s3_server.client().delete_object(Bucket=bucket.removeprefix("s3://"), Key="b.jpg")
    changed, deleted, good, large = read_samples(storage, shard, read_options(max_image_bytes=98))
    assert changed.error == f"image changed: {bucket}/a.jpg: the object is no longer the expected version"
    assert deleted.error == f"image not found: {bucket}/b.jpg: no such object"
    assert good == Sample("c.jpg", b"ccc")
    assert "99 bytes" in (large.error or "")


# Deadline ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_members_without_a_sample_count_toward_the_deadline(files: Path, compress: Any) -> None:
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    data = compress(folder.tobuf() * 100_000 + make_tar([("a.jpg", b"1")]))
    cause = r"reading one sample took more than 0\.05 s \(read\.timeout_s\)"
    with pytest.raises(ShardError, match=cause) as caught:
        read(files, data, read_options(timeout_s=0.05))
    assert caught.value.transient  # the storage may have been slow


def test_zeros_in_a_gzipped_tar_count_toward_the_deadline(files: Path) -> None:
    image, zeros = make_tar([("a.jpg", b"1")])[:1024], bytes(200 * 1024**2)
    after = gzip.compress(image + zeros, 1)  # the end of the tar
    skipped = tarfile.TarInfo("a.mp4")
    skipped.size = len(zeros)
    within = gzip.compress(skipped.tobuf() + zeros + image + bytes(1024), 1)
    for data in (after, within):
        with pytest.raises(ShardError, match=r"took more than 0\.05 s"):
            read(files, data, read_options(timeout_s=0.05))


def test_time_of_the_consumer_does_not_count_toward_the_deadline(files: Path) -> None:
    shard = shard_of(Storage(), f"{files}/x.tar", make_tar(make_samples(3)))
    reader = read_samples(Storage(), shard, read_options(timeout_s=0.5))
    next(reader)
    time.sleep(0.6)
    assert len(list(reader)) == 2


# Storage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_shard_deleted_or_changed_after_listing_is_refused(
    storage: Storage, bucket: str, name: str, s3_server: LocalS3
) -> None:
    shard = shard_of(storage, f"{bucket}/{name}", make_tar(make_samples(2)))
    storage.write(shard.uri, make_tar(make_samples(3)))
    with pytest.raises(ShardError) as caught:
        list(read_samples(storage, shard, PLAIN))
    assert str(caught.value) == f"{shard.uri}: the object is no longer the expected version"
    s3_server.client().delete_object(Bucket=bucket.removeprefix("s3://"), Key=name)
    with pytest.raises(ShardError, match="no such object"):
        list(read_samples(storage, shard, PLAIN))


def test_storage_failure_in_a_group_of_images_fails_the_shard(
    storage: Storage, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write(f"{bucket}/a.jpg", b"image")
    (shard,) = list_shards(storage, bucket)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ShardError, match=r"images-0+: s3://.*a\.jpg: .*SignatureDoesNotMatch"):
        list(read_samples(storage, shard, PLAIN))


def test_errors_and_options_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(ShardError("s3://b/x.tar", "truncated")))
    assert (str(error), error.uri) == ("s3://b/x.tar: truncated", "s3://b/x.tar")
    assert pickle.loads(pickle.dumps(NAMED)) == NAMED


def test_reader_can_be_closed_early(storage: Storage, tmp_path: Path) -> None:
    uris = [storage.write(f"{tmp_path}/{i:03d}.jpg", b"i") for i in range(100)]
    shard = Shard(f"{tmp_path}/images-0", "v", "images", 100, tuple(uris))
    missing = ObjectInfo(f"{tmp_path}/missing.jpg", 1, "1-1")
    reader = read_samples(storage, Shard(shard.uri, "v", "images", 1, (*uris, missing)), PLAIN)
    assert next(iter(reader)).key == "000.jpg"
    reader.close()  # type: ignore[attr-defined]
    with pytest.raises(StopIteration):
        next(reader)


# Memory ------------------------------------------------------------------------------------------

SHARD_BYTES = 150 * 1024**2
READ_ALL = """
import sys
from pathlib import Path
from pipeline.config import InputConfig
from pipeline.read import ReadOptions, list_shards, read_samples
from pipeline.storage import Storage

def peak():  # getrusage would include the peak of the parent process
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) // 1024

storage = Storage()
small, large = (list(list_shards(storage, InputConfig(uri=uri))) for uri in sys.argv[1:])
assert sum(1 for shard in small for _ in read_samples(storage, shard, ReadOptions())) > 0
before = peak()
total = sum(len(s.image) for shard in large for s in read_samples(storage, shard, ReadOptions()))
print(total, peak() - before)
"""


def test_memory_does_not_grow_with_the_number_of_members(files: Path) -> None:
    data = make_tar([(f"{i}.jpg", b"i") for i in range(8000)])
    shard = shard_of(Storage(), f"{files}/x.tar", data)
    tracemalloc.start()
    held = {}
    for i, _ in enumerate(read_samples(Storage(), shard, PLAIN)):
        if i in (1000, 7000):
            held[i] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held[7000] - held[1000] < 1024**2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "parquet"])
def test_memory_does_not_grow_with_the_shard(storage: Storage, tmp_path: Path, kind: str) -> None:
    seed = 50 if kind == "tar.gz" else 100 * 1024  # compressing random bytes is slow
    block = random.Random(1).randbytes(seed) * (100 * 1024 // seed)
    count = SHARD_BYTES // len(block)
    for name, images in (("small", 200), ("large", count)):
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":  # one row group, in pages of 16 rows
            options = {"use_dictionary": False, "compression": "none", "write_batch_size": 16}
            path.write_bytes(make_parquet({"image": [block] * images}, **options))
        else:
            data = make_tar([(f"{i}.jpg", block) for i in range(images)])
            path.write_bytes(gzip.compress(data, 1) if kind == "tar.gz" else data)
            del data
    result = subprocess.run(
        [sys.executable, "-c", READ_ALL, f"{tmp_path}/small.{kind}", f"{tmp_path}/large.{kind}"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    total, grown_mib = map(int, result.stdout.split())
    assert total == count * len(block)
    assert grown_mib < 40
