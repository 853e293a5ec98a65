"""Object storage on the real S3 server, local disks, and a Google Cloud Storage emulator."""

from __future__ import annotations

import os
import pickle
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from jobs.local_s3 import LocalS3
from pipeline.storage import (
    AccessDenied,
    ObjectChanged,
    ObjectNotFound,
    Storage,
    StorageError,
)


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
        return str(request.getfixturevalue("bucket")) + "/root"
    if request.param == "local":
        return str(request.getfixturevalue("tmp_path"))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("gcs_emulator"))
    return f"gs://emulated/{request.node.name}"


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
def test_a_reader_never_mixes_two_versions(storage: Storage, kind: str, bucket: str, tmp_path: Path) -> None:
    uri = (bucket if kind == "s3" else str(tmp_path)) + "/x"
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


def test_storage_travels_to_other_processes(storage: Storage, root: str) -> None:
    info = storage.write(f"{root}/x", b"bytes")
    assert pickle.loads(pickle.dumps(storage)).read(info.uri) == b"bytes"
    error = pickle.loads(pickle.dumps(ObjectChanged("s3://b/k", "changed")))
    assert type(error) is ObjectChanged
    assert str(error) == "s3://b/k: changed"


# S3 ----------------------------------------------------------------------------------------------


def test_listings_of_several_pages_are_complete_and_in_order(storage: Storage, bucket: str) -> None:
    expected = [f"{bucket}/many/{i:05d}" for i in range(1100)]  # S3's pages hold 1000
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda uri: storage.write(uri, b""), expected))
    assert names(storage, f"{bucket}/many") == expected


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


def test_an_endpoint_that_nobody_serves_is_named(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage = Storage(endpoint_url="http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"s3://b/x: the endpoint http://127.0.0.1:9 can't be reached"):
        list(storage.list("s3://b/x"))


def test_the_endpoint_may_come_from_the_environment(bucket: str) -> None:
    info = Storage().write(f"{bucket}/x", b"by AWS_ENDPOINT_URL_S3")
    assert Storage().read(info.uri) == b"by AWS_ENDPOINT_URL_S3"


class CuttingProxy:
    """Passes TCP on to the server, and breaks the first `cuts` connections off within an answer."""

    def __init__(self, upstream: str, cuts: int, after: int) -> None:
        self._upstream = (urlsplit(upstream).hostname, urlsplit(upstream).port)
        self._after = after
        self.cuts_left = cuts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._upstream)  # type: ignore[arg-type]
            threading.Thread(target=self._pass_on, args=(client, server), daemon=True).start()
            threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with source, target:
            try:
                while data := source.recv(65536):
                    target.sendall(data)
            except OSError:
                return

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        passed = 0
        try:
            while data := server.recv(65536):
                client.sendall(data)
                passed += len(data)
                if passed > self._after and self.cuts_left:
                    self.cuts_left -= 1
                    break
        except OSError:
            return
        finally:
            for end in (client, server):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def close(self) -> None:
        self._listener.close()


def test_a_body_that_breaks_off_is_fetched_again(storage: Storage, bucket: str, s3_server: LocalS3) -> None:
    data = random.Random(3).randbytes(10_000_000)
    info = storage.write(f"{bucket}/x", data)
    proxy = CuttingProxy(s3_server.endpoint_url, cuts=3, after=200_000)
    try:
        with Storage(endpoint_url=proxy.url).open(info.uri, info.version) as stream:
            stream.seek(1_000_000)
            assert stream.read() == data[1_000_000:]
    finally:
        proxy.close()
    assert proxy.cuts_left == 0


def test_a_body_that_always_breaks_off_is_an_error_in_the_end(
    storage: Storage, bucket: str, s3_server: LocalS3
) -> None:
    info = storage.write(f"{bucket}/x", bytes(2_000_000))
    proxy = CuttingProxy(s3_server.endpoint_url, cuts=1000, after=200_000)
    try:
        with pytest.raises(StorageError, match=f"{info.uri}: failed again and again, last with"):
            Storage(endpoint_url=proxy.url).read(info.uri, info.version)
    finally:
        proxy.close()


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


@pytest.mark.parametrize("uri", ["ftp://host/x", "s3://", "gs:///", "file://relative/x", ""])
def test_what_is_no_place_is_refused(storage: Storage, uri: str) -> None:
    with pytest.raises(StorageError, match=r"not supported|names no bucket|is not a"):
        storage.stat(uri)
