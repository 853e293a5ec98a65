"""Streams of objects: reads of any range, of one version, with read-ahead."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from pipeline.storage import ObjectChanged, ObjectNotFound, Storage
from tests.fault_proxy import FaultProxy

CHUNK = 8 * 1024**2  # size of one ranged read


def test_range_reads_return_the_same_bytes_as_a_full_read(storage: Storage, root: str) -> None:
    data = random.Random(1).randbytes(10 * 1024**2 + 123)
    info = storage.write(f"{root}/large", data)
    choose = random.Random(2)
    with storage.open(info.uri, info.version) as stream:
        for _ in range(8):
            start = choose.randrange(len(data))
            count = choose.choice([1, 1000, 9 * 1024**2])
            stream.seek(start)
            assert stream.read(count) == data[start : start + count]
        assert stream.seek(-5, os.SEEK_END) == len(data) - 5
        assert stream.read() == data[-5:]
        assert stream.read(1) == b""
    assert storage.read(info.uri) == data


@pytest.mark.parametrize("kind", ["s3", "local"])  # the emulator of gs:// ignores preconditions
def test_reader_never_mixes_two_versions(storage: Storage, kind: str, folder: str, tmp_path: Path) -> None:
    uri = (folder if kind == "s3" else str(tmp_path)) + "/x"
    info = storage.write(uri, b"a" * 20_000_000)
    stream = storage.open(uri)
    assert stream.read(10) == b"a" * 10
    if kind == "s3":
        storage.write(uri, b"b" * 20_000_000)
    else:
        Path(uri).write_bytes(b"b" * 20_000_000)  # in place, because a replaced file stays readable
    with pytest.raises(ObjectChanged, match="no longer the expected version"):
        stream.read()
    with pytest.raises(ObjectChanged):
        storage.read(uri, info.version)


@pytest.mark.parametrize("kind", ["truncated", "no_body", "reset", "error"])
def test_only_the_failed_range_is_read_again(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage, kind: str
) -> None:
    data = random.Random(3).randbytes(2 * CHUNK + 12345)
    info = storage.write(f"{folder}/x", data)
    ranges = [f"bytes={i * CHUNK}-{min((i + 1) * CHUNK, len(data)) - 1}" for i in range(3)]
    proxy.next(kind, kind, where=lambda request: request.range == ranges[1])
    assert faulty.read(info.uri, info.version) == data
    assert [request.range for request in proxy.seen] == [ranges[0], *[ranges[1]] * 3, ranges[2]]


def test_read_ahead_fetches_ranges_concurrently_and_correctly(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage
) -> None:
    data = random.Random(4).randbytes(4 * CHUNK + 12345)
    info = storage.write(f"{folder}/x", data)
    proxy.next("reset", "truncated", where=lambda request: request.range.startswith(f"bytes={2 * CHUNK}-"))
    with faulty.open(info.uri, info.version, 3) as file:
        assert file.read(100) == data[:100]
        deadline = time.monotonic() + 30
        while len({request.range for request in proxy.seen}) < 4:  # only the first range was requested
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert file.seek(CHUNK - 7) == CHUNK - 7
        assert file.read(CHUNK) == data[CHUNK - 7 : 2 * CHUNK - 7]
        assert file.read() == data[2 * CHUNK - 7 :]
        assert file.read(1) == b""
        file.seek(5)
        assert file.read(2 * CHUNK) == data[5 : 5 + 2 * CHUNK]
        file.seek(-3, os.SEEK_END)
        assert file.read() == data[-3:]
    assert proxy.remaining == 0


def test_read_ahead_is_pinned_to_the_version(storage: Storage, folder: str) -> None:
    info = storage.write(f"{folder}/x", bytes(3 * CHUNK))
    with storage.open(info.uri, info.version, 1) as file:
        assert file.read(10) == bytes(10)
        storage.write(info.uri, b"1" * 3 * CHUNK)
        with pytest.raises(ObjectChanged):
            file.read()
    with storage.open(f"{folder}/none", info.version, 2) as file, pytest.raises(ObjectNotFound):
        file.read()


def test_stream_with_read_ahead_buffers_little(storage: Storage, folder: str) -> None:
    info = storage.write(f"{folder}/x", bytes(CHUNK))
    with storage.open(info.uri, info.version, 1) as file:
        assert len(file.peek(1)) <= 1024**2


def test_empty_object_can_be_read_ahead(storage: Storage, folder: str) -> None:
    info = storage.write(f"{folder}/x", b"")
    with storage.open(info.uri, info.version, 2) as file:
        assert file.read() == b""
