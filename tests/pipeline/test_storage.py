"""Object storage on the real S3 server, local disks, and a Google Cloud Storage emulator."""

from __future__ import annotations

import os
import pickle
import random
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jobs.local_s3 import LocalS3
from pipeline import retrying
from pipeline.storage import (
    ABSENT,
    AccessDenied,
    ObjectChanged,
    ObjectInfo,
    ObjectNotFound,
    Storage,
    StorageError,
)
from tests.fault_proxy import ALL_KINDS, FaultProxy

CHUNK = 8 * 1024**2  # of one ranged read


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(retrying, "_LONGEST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def gcs_emulator() -> Iterator[str]:
    server_module = pytest.importorskip("gcp_storage_emulator.server", reason="no GCS emulator")
    pytest.importorskip("google.cloud.storage", reason="cvt-label[gcs] is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = server_module.create_server("127.0.0.1", port, in_memory=True, default_bucket="emulated")
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(params=["s3", "local", "gs"])
def root(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place that can be written to, on each service."""
    if request.param == "s3":
        return str(request.getfixturevalue("folder"))
    if request.param == "local":
        return str(request.getfixturevalue("tmp_path"))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("gcs_emulator"))
    return f"gs://emulated/{request.node.name}"


@pytest.fixture(scope="module")
def shared_bucket(s3_server: LocalS3) -> str:
    s3_server.create_bucket("shared-by-tests")
    return "s3://shared-by-tests"


@pytest.fixture
def folder(shared_bucket: str) -> str:
    """The URI of a fresh folder; a bucket takes the server longer."""
    return f"{shared_bucket}/{secrets.token_hex(6)}"


@pytest.fixture(scope="module")
def shared_proxy(s3_server: LocalS3) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """In front of the S3 server; passes all on but for what a test scripts."""
    shared_proxy.clear()
    yield shared_proxy
    assert shared_proxy.upstream_failures == 0


@pytest.fixture
def faulty(proxy: FaultProxy) -> Storage:
    """Storage that reaches the S3 server through the proxy."""
    return Storage(endpoint_url=proxy.url)


class Faults:
    """How many failures were tried again in the block, by kind."""

    def __enter__(self) -> Faults:
        self._before = retrying.faults()
        return self

    def __exit__(self, *_: object) -> None:
        self.counts = retrying.faults() - self._before


def names(storage: Storage, uri: str) -> list[str]:
    return [info.uri for info in storage.list(uri)]


def test_what_is_written_is_read_listed_and_described_alike(storage: Storage, root: str) -> None:
    written = storage.write(f"{root}/a/b.bin", b"some bytes")
    assert written.uri == f"{root}/a/b.bin"
    assert written.size == 10
    assert written.version.endswith("-10")
    assert storage.stat(written.uri) == written
    assert list(storage.list(root)) == [written]
    assert storage.read(written.uri) == b"some bytes"
    assert storage.read(written.uri, written.version) == b"some bytes"


def test_a_new_version_replaces_the_old_one_and_has_another_name(storage: Storage, root: str) -> None:
    first = storage.write(f"{root}/x", b"first")
    second = storage.write(f"{root}/x", b"other")
    assert first.version != second.version
    assert storage.read(first.uri) == b"other"
    assert names(storage, root) == [f"{root}/x"]


def test_an_empty_object_is_an_object(storage: Storage, root: str) -> None:
    info = storage.write(f"{root}/empty", b"")
    assert storage.read(info.uri) == b""
    assert names(storage, root) == [info.uri]


def test_a_listing_holds_the_folder_and_not_siblings_that_start_alike(storage: Storage, root: str) -> None:
    for name in ["train/1", "train/sub/2", "train-old/3", "train.tar", "trainer/4"]:
        storage.write(f"{root}/{name}", b"x")
    below = [f"{root}/train/1", f"{root}/train/sub/2"]
    assert names(storage, f"{root}/train") == below
    assert names(storage, f"{root}/train/") == below


def test_the_uri_of_an_object_lists_that_object_alone(storage: Storage, root: str) -> None:
    for name in ["a.tar", "a.tar.gz", "a.tar-1"]:
        storage.write(f"{root}/{name}", b"x")
    assert names(storage, f"{root}/a.tar") == [f"{root}/a.tar"]


def test_a_missing_object_is_named(storage: Storage, root: str) -> None:
    storage.write(f"{root}/there", b"x")
    for action in (storage.stat, storage.read, storage.open):
        with pytest.raises(ObjectNotFound, match="no such") as caught:
            action(f"{root}/missing.tar")
        assert caught.value.uri == f"{root}/missing.tar"


def test_reads_at_any_offset_return_the_same_bytes_as_the_whole(storage: Storage, root: str) -> None:
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


@pytest.mark.parametrize("kind", ["s3", "local"])  # the emulator of gs:// knows no preconditions
def test_a_reader_never_mixes_two_versions(storage: Storage, kind: str, folder: str, tmp_path: Path) -> None:
    uri = (folder if kind == "s3" else str(tmp_path)) + "/x"
    info = storage.write(uri, b"a" * 20_000_000)
    stream = storage.open(uri)
    assert stream.read(10) == b"a" * 10
    if kind == "s3":
        storage.write(uri, b"b" * 20_000_000)
    else:
        Path(uri).write_bytes(b"b" * 20_000_000)  # in place: replaced files stay readable to the end
    with pytest.raises(ObjectChanged, match="no longer the version that was listed"):
        stream.read()
    with pytest.raises(ObjectChanged):
        storage.read(uri, info.version)


def test_a_file_is_written_from_its_start(storage: Storage, root: str, tmp_path: Path) -> None:
    data = random.Random(5).randbytes(300_000)
    (tmp_path / "source").write_bytes(data)
    with (tmp_path / "source").open("rb") as file:
        file.seek(77)
        info = storage.write(f"{root}/x", file)
    assert info == storage.stat(f"{root}/x")
    assert storage.read(f"{root}/x", info.version) == data


def test_what_is_deleted_is_gone_and_may_be_deleted_again(storage: Storage, root: str) -> None:
    storage.write(f"{root}/x", b"x")
    storage.write(f"{root}/xy", b"y")
    storage.delete(f"{root}/x")
    with pytest.raises(ObjectNotFound):
        storage.stat(f"{root}/x")
    assert names(storage, root) == [f"{root}/xy"]
    storage.delete(f"{root}/x")
    storage.delete(f"{root}/no/such/folder/x")
    assert storage.read(f"{root}/xy") == b"y"


def test_what_is_expected_is_replaced(storage: Storage, root: str) -> None:
    first = storage.write(f"{root}/x", b"first", ABSENT)
    second = storage.write(f"{root}/x", b"second", first.version)
    assert second == storage.stat(f"{root}/x")
    assert storage.read(f"{root}/x") == b"second"
    storage.delete(f"{root}/x")
    storage.write(f"{root}/x", b"third", ABSENT)
    assert storage.read(f"{root}/x") == b"third"


exact = pytest.mark.parametrize("root", ["s3", "local"], indirect=True)  # gs: its emulator isn't


@exact
def test_only_the_expected_version_is_deleted(storage: Storage, root: str) -> None:
    first = storage.write(f"{root}/x", b"first")
    second = storage.write(f"{root}/x", b"second")
    with pytest.raises(ObjectChanged, match=r"/x: the object is not the version that was expected"):
        storage.delete(f"{root}/x", first.version)
    assert storage.read(f"{root}/x") == b"second"
    storage.delete(f"{root}/x", second.version)
    assert names(storage, root) == []
    storage.delete(f"{root}/x", second.version)


@exact
def test_what_is_not_expected_is_left_as_it_is(storage: Storage, root: str) -> None:
    stale = storage.write(f"{root}/x", b"stale")
    current = storage.write(f"{root}/x", b"other")
    for expected in (ABSENT, stale.version):
        with pytest.raises(ObjectChanged, match="not the version that was expected") as caught:
            storage.write(f"{root}/x", b"lost", expected)
        assert caught.value.uri == f"{root}/x"
        assert storage.stat(f"{root}/x") == current
        assert storage.read(f"{root}/x") == b"other"
    with pytest.raises(ObjectChanged):
        storage.write(f"{root}/missing", b"lost", current.version)
    assert [info.uri for info in storage.list(root)] == [f"{root}/x"]


@exact
def test_of_writers_that_expect_the_same_exactly_one_succeeds(storage: Storage, root: str) -> None:
    expected = ABSENT
    for turn in range(2):
        # On S3 a version is told by its content, so that no two may be alike.
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


def test_storage_travels_to_other_processes(storage: Storage, root: str) -> None:
    info = storage.write(f"{root}/x", b"bytes")
    assert pickle.loads(pickle.dumps(storage)).read(info.uri) == b"bytes"
    error = pickle.loads(pickle.dumps(ObjectChanged("s3://b/k", "changed")))
    assert type(error) is ObjectChanged
    assert str(error) == "s3://b/k: changed"


# S3 ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(shared_bucket: str) -> list[str]:
    """All the URIs of a folder: more than fit on a page, which holds 1000."""
    uris = [f"{shared_bucket}/many/{i:05d}" for i in range(1001)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda uri: Storage().write(uri, b""), uris))
    return uris


def test_listings_of_several_pages_are_complete_and_in_order(
    storage: Storage, shared_bucket: str, many: list[str]
) -> None:
    assert names(storage, f"{shared_bucket}/many") == many


def test_an_empty_prefix_lists_nothing_and_folder_markers_are_no_objects(
    storage: Storage, bucket: str, s3_server: LocalS3
) -> None:
    assert names(storage, f"{bucket}/nothing/here") == []
    s3_server.client().put_object(Bucket=bucket.removeprefix("s3://"), Key="folder/", Body=b"")
    assert names(storage, bucket) == []


def test_unusual_keys_come_back_as_they_are(storage: Storage, bucket: str) -> None:
    for name in ["sp ace+%41 ü.tar", "日本/😀.tar", "a=b&c?d#e.tar"]:
        uri = f"{bucket}/{name}"
        storage.write(uri, name.encode())
        assert storage.read(uri) == name.encode()
        assert uri in names(storage, bucket)


def test_a_missing_bucket_is_called_a_missing_bucket(storage: Storage, s3_server: LocalS3) -> None:
    for action in (
        lambda: list(storage.list("s3://no-such-bucket/train")),
        lambda: storage.stat("s3://no-such-bucket/x"),
        lambda: storage.read("s3://no-such-bucket/x"),
        lambda: storage.write("s3://no-such-bucket/x", b"data"),
        lambda: storage.write("s3://no-such-bucket/x", b"data", ABSENT),
    ):
        with pytest.raises(ObjectNotFound, match="bucket 'no-such-bucket' does not exist"):
            action()


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_rejected_credentials_are_told_without_showing_them(
    storage: Storage, bucket: str, s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "wrong" * 5)
    for action in (storage.list, storage.read, lambda uri: storage.write(uri, b"x")):
        with pytest.raises(AccessDenied) as caught:
            list(action(f"{bucket}/x"))
        message = str(caught.value)
        assert f"{bucket}/x: " in message
        assert "credentials were rejected" in message or "access denied" in message
        assert s3_server.secret_key not in message
        assert "wrongwrong" not in message


def test_missing_credentials_are_told_with_what_to_set(
    storage: Storage, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(AccessDenied, match=r"no usable AWS credentials.*AWS_ACCESS_KEY_ID"):
        list(storage.list(bucket))


def test_an_endpoint_that_nobody_serves_is_named(s3_server: LocalS3) -> None:
    storage = Storage(endpoint_url="http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"s3://b/x: the endpoint http://127.0.0.1:9 can't be reached"):
        list(storage.list("s3://b/x"))


def test_the_endpoint_may_come_from_the_environment(bucket: str) -> None:
    info = Storage().write(f"{bucket}/x", b"by AWS_ENDPOINT_URL_S3")
    assert Storage().read(info.uri) == b"by AWS_ENDPOINT_URL_S3"


# S3 that fails -----------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[Storage, ObjectInfo], Any]] = {
    "read": lambda storage, info: storage.read(info.uri, info.version),
    "write": lambda storage, info: storage.write(info.uri, b"some bytes"),
    "list": lambda storage, info: list(storage.list(info.uri.rpartition("/")[0])),
    "stat": lambda storage, info: storage.stat(info.uri),
    "delete": lambda storage, info: storage.delete(info.uri),
}
CONNECTION = {"ConnectionClosedError", "IncompleteRead", "ProtocolError"}
CALLED = {
    "error": {"InternalError", "500"},  # the answer to a HEAD has no body that would say more
    "slow_down": {"SlowDown", "503"},
    "denied": {"AccessDenied", "403"},
    "reset": CONNECTION,
    "lost_answer": CONNECTION,
    "truncated": CONNECTION | {"500"},  # what botocore makes of a listing that is no XML
    "no_body": CONNECTION,
    "no_head": CONNECTION,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", CALLED)
def test_what_fails_for_a_moment_is_tried_again_and_counted(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage, kind: str, operation: str
) -> None:
    info = storage.write(f"{folder}/x", b"some bytes")
    expected = {"read": b"some bytes", "write": info, "list": [info], "stat": info, "delete": None}[operation]
    proxy.next(kind, kind, kind)
    with Faults() as faults:
        assert OPERATIONS[operation](faulty, info) == expected
    if (kind, operation) == ("no_head", "delete"):  # its first line tells it all
        assert (len(proxy.seen), faults.counts) == (1, Counter())
        return
    assert proxy.injected == {kind: 3}
    assert faults.counts.total() == 3
    assert set(faults.counts) <= CALLED[kind]
    if operation == "delete":
        assert names(storage, folder) == []
    else:
        assert storage.read(info.uri) == b"some bytes"


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("kind", "attempts", "error", "told"),
    [
        ("denied", 4, AccessDenied, "access denied"),
        ("error", 10, StorageError, "InternalError|500"),
        ("reset", 10, StorageError, "failed again and again, last with"),
    ],
)
def test_what_never_ends_is_an_error_that_names_the_object(
    storage: Storage,
    folder: str,
    proxy: FaultProxy,
    faulty: Storage,
    operation: str,
    kind: str,
    attempts: int,
    error: type[StorageError],
    told: str,
) -> None:
    info = storage.write(f"{folder}/x", b"some bytes")
    if (kind, operation) == ("reset", "list"):
        attempts = 5  # tells sooner that an endpoint is wrong
    proxy.next(*[kind] * 50)
    with Faults() as faults, pytest.raises(error, match=told) as caught:
        OPERATIONS[operation](faulty, info)
    assert caught.value.uri == (f"{folder}" if operation == "list" else info.uri)
    assert type(caught.value) is error
    assert len(proxy.seen) == attempts
    assert faults.counts.total() == attempts - 1


@pytest.mark.parametrize("kind", ["truncated", "no_body"])
def test_an_answer_that_always_breaks_off_is_an_error_in_the_end(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage, kind: str
) -> None:
    info = storage.write(f"{folder}/x", bytes(2_000_000))
    proxy.next(*[kind] * 50)
    with pytest.raises(StorageError, match=f"{info.uri}: failed again and again, last with"):
        faulty.read(info.uri, info.version)
    assert len(proxy.seen) == 10


@pytest.mark.parametrize("kind", ["truncated", "no_body", "reset", "error"])
def test_of_a_large_object_only_the_range_that_failed_is_read_again(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage, kind: str
) -> None:
    data = random.Random(3).randbytes(2 * CHUNK + 12345)
    info = storage.write(f"{folder}/x", data)
    ranges = [f"bytes={i * CHUNK}-{min((i + 1) * CHUNK, len(data)) - 1}" for i in range(3)]
    proxy.next(kind, kind, where=lambda request: request.range == ranges[1])
    assert faulty.read(info.uri, info.version) == data
    assert [request.range for request in proxy.seen] == [ranges[0], *[ranges[1]] * 3, ranges[2]]


def test_reading_ahead_has_several_ranges_under_way_and_gives_the_same_bytes(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage
) -> None:
    data = random.Random(4).randbytes(4 * CHUNK + 12345)
    info = storage.write(f"{folder}/x", data)
    proxy.next("reset", "truncated", where=lambda request: request.range.startswith(f"bytes={2 * CHUNK}-"))
    with faulty.open_ahead(info.uri, info.version, 3) as file:
        assert file.read(100) == data[:100]
        deadline = time.monotonic() + 30
        while len({request.range for request in proxy.seen}) < 4:  # though only the first was asked for
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
    assert proxy.left == 0


def test_what_is_read_ahead_is_pinned_to_its_version(storage: Storage, folder: str) -> None:
    info = storage.write(f"{folder}/x", bytes(3 * CHUNK))
    with storage.open_ahead(info.uri, info.version, 1) as file:
        assert file.read(10) == bytes(10)
        storage.write(info.uri, b"1" * 3 * CHUNK)
        with pytest.raises(ObjectChanged):
            file.read()
    with storage.open_ahead(f"{folder}/none", info.version, 2) as file, pytest.raises(ObjectNotFound):
        file.read()


def test_an_empty_object_can_be_read_ahead(storage: Storage, folder: str) -> None:
    info = storage.write(f"{folder}/x", b"")
    with storage.open_ahead(info.uri, info.version, 2) as file:
        assert file.read() == b""


def test_a_listing_of_which_a_page_breaks_off_is_complete(
    shared_bucket: str, many: list[str], proxy: FaultProxy, faulty: Storage
) -> None:
    kinds = ("no_body", "truncated", "no_head")
    proxy.next(*kinds, where=lambda request: "max-keys=1&" in request.path)
    proxy.next(*kinds, where=lambda request: "continuation-token" in request.path)
    proxy.next(*kinds, where=lambda request: "max-keys=1&" not in request.path)
    assert names(faulty, f"{shared_bucket}/many") == many
    assert proxy.left == 0


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - {"stat"}))  # a HEAD tells nothing but 403
def test_wrong_credentials_are_not_tried_again(
    storage: Storage,
    folder: str,
    proxy: FaultProxy,
    faulty: Storage,
    operation: str,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = storage.write(f"{folder}/x", b"some bytes")
    monkeypatch.setenv(variable, "wrong" * 5)
    with Faults() as faults, pytest.raises(AccessDenied, match="credentials were rejected"):
        OPERATIONS[operation](faulty, info)
    assert len(proxy.seen) == 1
    assert faults.counts == Counter()


def test_a_missing_object_is_not_tried_again(folder: str, proxy: FaultProxy, faulty: Storage) -> None:
    with Faults() as faults:
        with pytest.raises(ObjectNotFound):
            faulty.read(f"{folder}/x", "0123456789abcdef-5")
        assert [request.method for request in proxy.seen] == ["GET"]
        with pytest.raises(ObjectNotFound):
            faulty.stat(f"{folder}/y")
        assert [request.method for request in proxy.seen] == ["GET", "HEAD", "GET"]  # is there a bucket?
    assert faults.counts == Counter()


def test_a_write_whose_answer_was_lost_is_told_as_a_change_of_the_object(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage
) -> None:
    proxy.next("lost_answer")
    with pytest.raises(ObjectChanged, match="not the version that was expected"):
        faulty.write(f"{folder}/x", b"mine", ABSENT)
    assert storage.read(f"{folder}/x") == b"mine"
    proxy.next("lost_answer")
    with pytest.raises(ObjectChanged):
        faulty.write(f"{folder}/x", b"mine too", storage.stat(f"{folder}/x").version)
    assert storage.read(f"{folder}/x") == b"mine too"


@pytest.mark.parametrize("kind", ["error", "denied", "reset"])
def test_a_conditional_write_that_was_not_carried_out_is_tried_again(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage, kind: str
) -> None:
    proxy.next(kind)
    first = faulty.write(f"{folder}/x", b"first", ABSENT)
    proxy.next(kind)
    second = faulty.write(f"{folder}/x", b"second", first.version)
    assert storage.stat(f"{folder}/x") == second
    assert storage.read(f"{folder}/x") == b"second"


@pytest.mark.parametrize("kind", ["error", "reset", "lost_answer"])
def test_a_file_is_written_whole_though_it_was_sent_before(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage, kind: str, tmp_path: Path
) -> None:
    data = random.Random(4).randbytes(3_000_000)
    (tmp_path / "file").write_bytes(data)
    proxy.next(kind, kind)
    with (tmp_path / "file").open("rb") as file:
        file.seek(1000)
        written = faulty.write(f"{folder}/x", file)
        assert not file.closed
    assert written.size == len(data)
    assert len(proxy.seen) == 3
    assert storage.read(f"{folder}/x") == data


def test_many_at_once_come_through_faults_by_chance(
    storage: Storage, folder: str, s3_server: LocalS3
) -> None:
    contents = {f"{folder}/{i}": random.Random(i).randbytes(20_000 + i) for i in range(60)}

    def write_and_read(uri: str) -> bool:
        written = through.write(uri, contents[uri])
        return through.stat(uri) == written and through.read(uri, written.version) == contents[uri]

    with FaultProxy(s3_server.endpoint_url, seed=1, rate=0.4, delay_seconds=0.01) as proxy:
        through = Storage(endpoint_url=proxy.url)
        with Faults() as faults, ThreadPoolExecutor(12) as pool:
            assert all(pool.map(write_and_read, contents))
            assert sorted(names(through, folder)) == sorted(contents)
        assert set(proxy.injected) == set(ALL_KINDS)
        assert faults.counts.total() == proxy.injected.total() - proxy.injected["delay"]
        assert proxy.upstream_failures == 0


# Google Cloud Storage ----------------------------------------------------------------------------


def test_a_missing_bucket_of_google_is_called_a_missing_bucket(
    storage: Storage, gcs_emulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    for action in (
        lambda: list(storage.list("gs://no-such-bucket/train")),
        lambda: storage.stat("gs://no-such-bucket/x"),
        lambda: storage.write("gs://no-such-bucket/x", b"data"),
    ):
        with pytest.raises(ObjectNotFound, match="bucket 'no-such-bucket' does not exist"):
            action()


@pytest.mark.parametrize(
    "kind", ["error", "slow_down", "denied", "reset", "lost_answer", "truncated", "no_body"]
)
@pytest.mark.parametrize("operation", ["read", "write", "delete", "list", "stat"])
def test_what_fails_for_a_moment_at_google_is_tried_again_and_counted(
    storage: Storage, gcs_emulator: str, kind: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    info = storage.write(f"gs://emulated/{kind}-{operation}/x", b"some bytes")
    with FaultProxy(gcs_emulator) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        proxy.next(kind, kind, where=lambda request: "/b/emulated/o" in request.path)  # not on the bucket
        with Faults() as faults:
            result = OPERATIONS[operation](storage, info)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    assert faults.counts.total() == 2
    if operation == "delete":
        assert names(storage, info.uri) == []
    elif operation == "list":
        assert result == [info]
    else:
        assert result == (b"some bytes" if operation == "read" else storage.stat(info.uri))
        assert storage.read(info.uri) == b"some bytes"


# Local files -------------------------------------------------------------------------------------


def test_local_listings_are_bytewise_and_follow_links_but_no_cycles(storage: Storage, tmp_path: Path) -> None:
    files = ["a/1", "a-b/2", "a.tar", "B", "ü", "z/y/x"]
    root = tmp_path / "root"
    for name in files:
        storage.write(f"{root}/{name}", b"x")
    (root / "z" / "back").symlink_to(root)
    (root / "dead.tar").symlink_to(tmp_path / "gone")
    outside = storage.write(f"{tmp_path}/outside/in.tar", b"x")
    (root / "linked").symlink_to(tmp_path / "outside")
    found = [uri.removeprefix(f"{root}/") for uri in names(storage, str(root))]
    assert found == sorted([*files, "dead.tar", "linked/in.tar"], key=str.encode)
    with pytest.raises(ObjectNotFound):
        storage.read(f"{root}/dead.tar", "0-0")
    assert storage.read(outside.uri) == b"x"


def test_local_paths_have_one_spelling(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = storage.write(f"file://{tmp_path}/with%20space/x", b"x")
    assert info.uri == f"{tmp_path}/with space/x"
    monkeypatch.chdir(tmp_path)
    assert names(storage, "with space/../with space/") == [info.uri]
    assert storage.stat("with space/x") == info


def test_a_missing_local_folder_is_told(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match="nowhere: no such file or folder"):
        list(storage.list(f"{tmp_path}/nowhere"))


def test_a_failed_local_write_leaves_nothing_behind(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").mkdir()  # can't be replaced by a file
    with pytest.raises(StorageError, match=f"{tmp_path}/x.parquet: "):
        storage.write(f"{tmp_path}/x.parquet", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def test_readers_of_a_local_folder_see_whole_files_only(storage: Storage, tmp_path: Path) -> None:
    contents = [b"a" * 3_000_000, b"b" * 2_000_000]
    storage.write(f"{tmp_path}/x.parquet", contents[0])
    done = threading.Event()

    def write() -> None:
        for i in range(20):
            storage.write(f"{tmp_path}/x.parquet", contents[i % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        found = list(tmp_path.glob("**/*.parquet"))
        assert [path.name for path in found] == ["x.parquet"]
        data = found[0].read_bytes()
        assert data in contents
        seen.add(data[:1])
    writer.join()
    assert seen


def test_local_writes_of_one_moment_have_different_versions(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:  # the last step before a file is looked at: time stands still
        os.utime(descriptor, ns=(10**18, 10**18))

    monkeypatch.setattr(os, "fsync", fsync)
    for expected in (None, "as before"):
        written = [storage.write(f"{tmp_path}/x", b"0")]
        for i in range(1, 10):
            written.append(storage.write(f"{tmp_path}/x", b"%d" % i, expected and written[-1].version))
            assert storage.stat(f"{tmp_path}/x") == written[-1]
        assert len({info.version for info in written}) == 10
        with pytest.raises(ObjectChanged):
            storage.read(f"{tmp_path}/x", written[-2].version)


@pytest.mark.parametrize("uri", ["ftp://host/x", "s3://", "gs:///", "file://relative/x", ""])
def test_what_is_no_place_is_refused(storage: Storage, uri: str) -> None:
    with pytest.raises(StorageError, match=r"not supported|names no bucket|is not a"):
        storage.stat(uri)
