"""Operations that behave the same on the S3 server, local disks, and a Google Cloud Storage emulator."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import random
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.storage import (
    ABSENT,
    ObjectChanged,
    ObjectInfo,
    ObjectNotFound,
    Storage,
    StorageError,
    is_relative,
    normalize_uri,
    relative_name,
)
from tests.pipeline.storage.operations import RetryCounter, names


def test_written_object_can_be_read_listed_and_described(storage: Storage, root: str) -> None:
    written = storage.write(f"{root}/a/b.bin", b"some bytes")
    assert written.uri == f"{root}/a/b.bin"
    assert written.size == 10
    assert written.version.endswith("-10")
    assert storage.stat(written.uri) == written
    assert list(storage.list(root)) == [written]
    assert storage.read(written.uri) == b"some bytes"
    assert storage.read(written.uri, written.version) == b"some bytes"


def test_rewritten_object_has_a_new_version(storage: Storage, root: str) -> None:
    first = storage.write(f"{root}/x", b"first")
    second = storage.write(f"{root}/x", b"other")
    assert first.version != second.version
    assert storage.read(first.uri) == b"other"
    assert names(storage, root) == [f"{root}/x"]


def test_empty_object_can_be_written_and_read(storage: Storage, root: str) -> None:
    info = storage.write(f"{root}/empty", b"")
    assert storage.read(info.uri) == b""
    assert names(storage, root) == [info.uri]


def test_listing_excludes_siblings_with_the_same_prefix(storage: Storage, root: str) -> None:
    for name in ["train/1", "train/sub/2", "train-old/3", "train.tar", "trainer/4"]:
        storage.write(f"{root}/{name}", b"x")
    expected = [f"{root}/train/1", f"{root}/train/sub/2"]
    assert names(storage, f"{root}/train") == expected


def test_object_uri_lists_only_the_object(storage: Storage, root: str) -> None:
    for name in ["a.tar", "a.tar.gz", "a.tar-1"]:
        storage.write(f"{root}/{name}", b"x")
    assert names(storage, f"{root}/a.tar") == [f"{root}/a.tar"]


def test_missing_folder_lists_nothing(storage: Storage, root: str) -> None:
    assert list(storage.list(f"{root}/none/at/all")) == []


def test_read_latest_restarts_when_the_object_is_replaced(
    storage: Storage, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert storage.read_latest(f"{root}/x", io.BufferedReader.read) is None
    storage.write(f"{root}/x", b"first")
    seen: list[bytes] = []

    def read(file: io.BufferedReader) -> bytes:
        seen.append(b"")
        if len(seen) == 1:
            storage.write(f"{root}/x", b"second")
            raise ObjectChanged(f"{root}/x", "replaced")
        return file.read()

    found = storage.read_latest(f"{root}/x", read)
    assert found is not None
    assert (found.content, found.version) == (b"second", storage.version(f"{root}/x"))
    monkeypatch.setattr("pipeline.storage.retrying._MAX_SWAP_S", 0.5)
    writers = itertools.count()

    def lose(file: io.BufferedReader) -> bytes:
        storage.write(f"{root}/x", f"replaced {next(writers)}".encode())
        raise ObjectChanged(f"{root}/x", "replaced")

    with pytest.raises(ObjectChanged, match=r"other writers were faster for 0\.5 s, last: replaced"):
        storage.read_latest(f"{root}/x", lose)


def test_closed_file_is_reported_before_a_request(storage: Storage, root: str) -> None:
    file = io.BytesIO(b"data")
    file.close()
    with RetryCounter() as retries, pytest.raises(ValueError, match="closed file"):
        storage.write(f"{root}/x", file)
    assert retries.counts.total() == 0


def test_error_names_the_missing_object(storage: Storage, root: str) -> None:
    storage.write(f"{root}/there", b"x")
    for action in (storage.stat, storage.read, storage.open):
        with pytest.raises(ObjectNotFound, match="no such") as caught:
            action(f"{root}/missing.tar")
        assert caught.value.uri == f"{root}/missing.tar"


def test_file_is_written_from_its_start(storage: Storage, root: str, tmp_path: Path) -> None:
    data = random.Random(5).randbytes(300_000)
    (tmp_path / "source").write_bytes(data)
    with (tmp_path / "source").open("rb") as file:
        file.seek(77)
        info = storage.write(f"{root}/x", file)
    assert info == storage.stat(f"{root}/x")
    assert storage.read(f"{root}/x", info.version) == data


def test_deletion_is_idempotent_and_affects_only_the_object(storage: Storage, root: str) -> None:
    storage.write(f"{root}/x", b"x")
    storage.write(f"{root}/xy", b"y")
    storage.delete(f"{root}/x")
    with pytest.raises(ObjectNotFound):
        storage.stat(f"{root}/x")
    assert names(storage, root) == [f"{root}/xy"]
    storage.delete(f"{root}/x")
    storage.delete(f"{root}/no/such/folder/x")
    assert storage.read(f"{root}/xy") == b"y"


# The emulator of gs:// ignores preconditions.
conditional = pytest.mark.parametrize("root", ["s3", "local"], indirect=True)


@conditional
def test_expected_version_is_replaced(storage: Storage, root: str) -> None:
    first = storage.write(f"{root}/x", b"first", ABSENT)
    second = storage.write(f"{root}/x", b"second", first.version)
    assert second == storage.stat(f"{root}/x")
    assert storage.read(f"{root}/x") == b"second"
    storage.delete(f"{root}/x")
    storage.write(f"{root}/x", b"third", ABSENT)
    assert storage.read(f"{root}/x") == b"third"


@conditional
def test_only_the_expected_version_is_deleted(storage: Storage, root: str) -> None:
    first = storage.write(f"{root}/x", b"first")
    second = storage.write(f"{root}/x", b"second")
    with pytest.raises(ObjectChanged, match=r"/x: the object is no longer the expected version"):
        storage.delete(f"{root}/x", first.version)
    assert storage.read(f"{root}/x") == b"second"
    storage.delete(f"{root}/x", second.version)
    assert names(storage, root) == []
    storage.delete(f"{root}/x", second.version)


@conditional
def test_unexpected_version_is_not_replaced(storage: Storage, root: str) -> None:
    stale = storage.write(f"{root}/x", b"stale")
    current = storage.write(f"{root}/x", b"other")
    for expected in (ABSENT, stale.version):
        with pytest.raises(ObjectChanged, match="no longer the expected version") as caught:
            storage.write(f"{root}/x", b"lost", expected)
        assert caught.value.uri == f"{root}/x"
        assert storage.stat(f"{root}/x") == current
        assert storage.read(f"{root}/x") == b"other"
    with pytest.raises(ObjectChanged):
        storage.write(f"{root}/missing", b"lost", current.version)
    assert [info.uri for info in storage.list(root)] == [f"{root}/x"]


@conditional
def test_concurrent_updates_are_all_kept(storage: Storage, root: str) -> None:
    uri = f"{root}/log"

    def append(i: int) -> None:
        def change(version: str) -> bytes:
            return (b"" if version == ABSENT else storage.read(uri, version)) + b"%d," % i

        assert storage.update(uri, change) is not None

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(append, range(24)))
    assert sorted(map(int, storage.read(uri).decode().split(",")[:-1])) == list(range(24))


@conditional
def test_update_starts_from_expected_version_and_may_stop(storage: Storage, root: str) -> None:
    uri, seen = f"{root}/x", list[str]()

    def change(version: str) -> bytes | None:
        seen.append(version)
        return b"mine" if version == ABSENT else None

    written = storage.update(uri, change, ABSENT)
    assert written == storage.stat(uri)
    assert storage.update(uri, change, ABSENT) is None
    assert seen == [ABSENT, ABSENT, storage.version(uri)]
    assert storage.read(uri) == b"mine"


@conditional
def test_update_fails_after_the_time_limit(
    storage: Storage, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.retrying._MAX_SWAP_S", 0.5)
    uri, attempts = f"{root}/x", 0

    def change(version: str) -> bytes:
        nonlocal attempts
        attempts += 1
        storage.write(uri, b"by another %d" % attempts)
        return b"mine"

    with pytest.raises(ObjectChanged):
        storage.update(uri, change)
    assert attempts > 3
    assert storage.read(uri) == b"by another %d" % attempts


@conditional
@pytest.mark.slow
def test_64_simultaneous_writers_all_update_an_object(storage: Storage, root: str) -> None:
    """As drivers that end together and update the manifest: the number of attempts has no limit."""
    uri, start, seen = f"{root}/x", threading.Barrier(64), Counter[int]()

    def add(number: int) -> None:
        def change(version: str) -> bytes:
            seen[number] += 1
            lines = b"" if version == ABSENT else storage.read(uri, version)
            return lines + b"%d\n" % number

        start.wait()
        for _ in range(2):
            storage.update(uri, change)

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(add, range(64)))
    assert sorted(map(int, storage.read(uri).split())) == sorted([*range(64)] * 2)
    assert max(seen.values()) > 2


@conditional
def test_one_of_concurrent_conditional_writes_succeeds(storage: Storage, root: str) -> None:
    expected = ABSENT
    for turn in range(2):
        # On S3, the content determines the version, so the contents must differ.
        contents = [b"by writer %d of turn %d" % (i, turn) for i in range(16)]
        start = threading.Barrier(len(contents))

        def write(
            content: bytes, start: threading.Barrier = start, expected: str = expected
        ) -> ObjectInfo | None:
            start.wait()
            try:
                return storage.write(f"{root}/x", content, expected)
            except ObjectChanged:
                return None

        with ThreadPoolExecutor(len(contents)) as pool:
            results = list(pool.map(write, contents))
        ((content, info),) = [(c, info) for c, info in zip(contents, results, strict=True) if info]
        assert storage.stat(f"{root}/x") == info
        assert storage.read(f"{root}/x") == content
        expected = info.version


def test_list_folders_returns_direct_subfolders(storage: Storage, root: str) -> None:
    for name in ("a/x", "a/b/y", "c.tar", "d e/z", "ab"):
        storage.write(f"{root}/{name}", b"")
    assert list(storage.list_folders(root)) == [f"{root}/a", f"{root}/d e"]
    assert list(storage.list_folders(f"{root}/a")) == [f"{root}/a/b"]
    assert list(storage.list_folders(f"{root}/a/b")) == []


def test_storage_and_errors_can_be_pickled(storage: Storage, root: str) -> None:
    info = storage.write(f"{root}/x", b"bytes")
    assert pickle.loads(pickle.dumps(storage)).read(info.uri) == b"bytes"
    error = pickle.loads(pickle.dumps(ObjectChanged("s3://b/k", "changed")))
    assert type(error) is ObjectChanged
    assert str(error) == "s3://b/k: changed"


def test_unsupported_scheme_is_refused(storage: Storage) -> None:
    with pytest.raises(StorageError, match="ftp:// is not supported"):
        storage.stat("ftp://host/x")


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "s3:/key:planted@bucket",
            "s3:planted",
            "S3//planted",
            "gs:/planted",
            "S3://b/x?planted",
        ),
        *("https://b.s3.amazonaws.com/x?X-Amz-Signature=planted", "https:/h?token=planted", "hdfs:/planted"),
        *("s3;//planted", "s3.//planted", "gs-//planted", "s3/:/planted", "ssh:key@planted", "s3a//planted"),
        *("s3://b/x?X-Amz-Credential=planted", "gs://b/x?a=b&X-Goog-Signature=planted", "s3a://planted"),
    ],
)
def test_mistyped_or_signed_uri_is_refused_without_being_shown(uri: str) -> None:
    assert not is_relative(uri)
    with pytest.raises(StorageError, match=r"local path|set credentials") as caught:
        normalize_uri(uri)
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["a=b&c?d#e.tar", "./s3:x", "folder/s3:/x", "my:folder", "s3/x", "s3-data/x"]
)
def test_path_that_looks_like_a_uri_is_a_path(path: str) -> None:
    assert is_relative(path)
    assert normalize_uri(path) == str(Path.cwd() / path)


@pytest.mark.parametrize("uri", ["s3://", "gs:///", "file://relative/x", "file://localhost", ""])
def test_uri_without_bucket_or_path_is_refused(uri: str) -> None:
    with pytest.raises(StorageError, match=r"has no bucket|must be absolute|is empty"):
        normalize_uri(uri)


@pytest.mark.parametrize(
    ("uri", "normalized"),
    [
        ("s3://bucket/folder/", "s3://bucket/folder"),
        ("gs://bucket//", "gs://bucket"),
        ("file:///data/with%20space/", "/data/with space"),
        ("file:/data/a", "/data/a"),
        ("file://localhost/data/a", "/data/a"),
        ("/data//a/../b/", "/data/b"),
    ],
)
def test_uri_is_normalized(uri: str, normalized: str) -> None:
    assert normalize_uri(uri) == normalize_uri(normalized) == normalized


def test_client_libraries_are_imported_on_first_use(tmp_path: Path) -> None:
    code = """
import sys
from pipeline.storage import Storage
Storage().write(sys.argv[1], b"x")
assert not {"boto3", "botocore", "google.cloud.storage"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=True, timeout=300)


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("train-", ["train-0", "train-1", "train-x/a"]),
        ("train-0", ["train-0"]),
        ("train-x/", ["train-x/a"]),
        ("other/deep/t", ["other/deep/t1", "other/deep/t2/x"]),
        ("none", []),
        ("no/such/folder", []),
        ("", ["other/a", "other/deep/t1", "other/deep/t2/x", "train-0", "train-1", "train-x/a"]),
    ],
)
def test_listing_with_a_prefix_has_only_its_objects(
    root: str, storage: Storage, prefix: str, expected: list[str]
) -> None:
    written = ["other/a", "other/deep/t1", "other/deep/t2/x", "train-0", "train-1", "train-x/a"]
    for name in written:
        storage.write(f"{root}/{name}", b"x")
    storage.write(f"{root}x/train-0", b"x")
    found = [relative_name(root, info.uri) for info in storage.list(root, prefix=prefix)]
    assert found == expected
    assert list(storage.list(f"{root}/train-0", prefix="x")) == []


def test_local_listing_with_a_prefix_enters_only_matching_folders(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/x", "b/x"):
        storage.write(f"{tmp_path}/{name}", b"x")
    entered, scan = list[str](), os.scandir
    monkeypatch.setattr("os.scandir", lambda path: entered.append(path) or scan(path))
    assert names(storage, str(tmp_path)) == [f"{tmp_path}/a/x", f"{tmp_path}/b/x"]
    assert entered.pop() == f"{tmp_path}/b"
    entered.clear()
    assert len(list(storage.list(str(tmp_path), prefix="a"))) == 1
    assert entered == [str(tmp_path), f"{tmp_path}/a"]
