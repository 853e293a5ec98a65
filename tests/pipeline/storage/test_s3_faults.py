"""Failures of S3: the S3 server behind a proxy that breaks responses."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs.local_s3 import LocalS3
from pipeline.storage import ABSENT, AccessDenied, ObjectChanged, ObjectNotFound, Storage, StorageError
from tests.fault_proxy import ALL_KINDS, FaultProxy
from tests.pipeline.storage.operations import OPERATIONS, RetryCounter, names

CONNECTION = {"ConnectionClosedError", "IncompleteRead", "MalformedResponse", "ProtocolError"}
KINDS_OF = {
    "error": {"InternalError", "500"},  # the response to HEAD has no body
    "slow_down": {"SlowDown", "503"},
    "denied": {"AccessDenied", "403"},
    "reset": CONNECTION,
    "lost_answer": CONNECTION,
    "truncated": CONNECTION | {"500"},  # botocore's status for a listing that is not XML
    "no_body": CONNECTION,
    "no_head": CONNECTION,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", KINDS_OF)
def test_transient_failures_are_retried_and_counted(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage, kind: str, operation: str
) -> None:
    info = storage.write(f"{folder}/x", b"some bytes")
    expected = {"read": b"some bytes", "write": info, "list": [info], "stat": info, "delete": None}[operation]
    proxy.next(kind, kind, kind)
    with RetryCounter() as retries:
        assert OPERATIONS[operation](faulty, info) == expected
    if (kind, operation) == ("no_head", "delete"):  # the status line is the whole response
        assert (len(proxy.seen), retries.counts) == (1, Counter())
        return
    assert proxy.injected == {kind: 3}
    assert retries.counts.total() == 3
    assert set(retries.counts) <= KINDS_OF[kind]
    if operation == "delete":
        assert names(storage, folder) == []
    else:
        assert storage.read(info.uri) == b"some bytes"


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("kind", "attempts", "error", "message"),
    [
        ("denied", 4, AccessDenied, "access denied"),
        ("error", 10, StorageError, "InternalError|500"),
        ("reset", 10, StorageError, "failed after retries, last with"),
    ],
)
def test_lasting_failure_is_an_error_that_names_the_object(
    storage: Storage,
    folder: str,
    proxy: FaultProxy,
    faulty: Storage,
    operation: str,
    kind: str,
    attempts: int,
    error: type[StorageError],
    message: str,
) -> None:
    info = storage.write(f"{folder}/x", b"some bytes")
    if (kind, operation) == ("reset", "list"):
        attempts = 5  # reports a wrong endpoint sooner
    proxy.next(*[kind] * 50)
    with RetryCounter() as retries, pytest.raises(error, match=message) as caught:
        OPERATIONS[operation](faulty, info)
    assert caught.value.uri == (f"{folder}" if operation == "list" else info.uri)
    assert type(caught.value) is error
    assert len(proxy.seen) == attempts
    assert retries.counts.total() == attempts - 1


@pytest.mark.parametrize("kind", ["truncated", "no_body"])
def test_repeatedly_truncated_response_is_an_error(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage, kind: str
) -> None:
    info = storage.write(f"{folder}/x", bytes(2_000_000))
    proxy.next(*[kind] * 50)
    with pytest.raises(StorageError, match=f"{info.uri}: failed after retries, last with"):
        faulty.read(info.uri, info.version)
    assert len(proxy.seen) == 10


def test_listing_is_complete_after_truncated_pages(
    shared_bucket: str, many: list[str], proxy: FaultProxy, faulty: Storage
) -> None:
    kinds = ("no_body", "truncated", "no_head")
    proxy.next(*kinds, where=lambda request: "max-keys=1&" in request.path)
    proxy.next(*kinds, where=lambda request: "continuation-token" in request.path)
    proxy.next(*kinds, where=lambda request: "max-keys=1&" not in request.path)
    assert names(faulty, f"{shared_bucket}/many") == many
    assert proxy.remaining == 0


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - {"stat"}))  # a HEAD returns only 403
def test_wrong_credentials_are_not_retried(
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
    with RetryCounter() as retries, pytest.raises(StorageError, match="credentials were rejected"):
        OPERATIONS[operation](faulty, info)
    assert len(proxy.seen) == 1
    assert retries.counts == Counter()


def test_missing_object_is_not_retried(folder: str, proxy: FaultProxy, faulty: Storage) -> None:
    with RetryCounter() as retries:
        with pytest.raises(ObjectNotFound):
            faulty.read(f"{folder}/x", "0123456789abcdef-5")
        assert [request.method for request in proxy.seen] == ["GET"]
        with pytest.raises(ObjectNotFound):
            faulty.stat(f"{folder}/y")
        assert [request.method for request in proxy.seen] == [
            "GET",
            "HEAD",
            "GET",
        ]  # the last: the bucket
        assert "max-keys=1&" in proxy.seen[-1].path
    assert retries.counts == Counter()


def test_conditional_write_with_lost_response_reports_a_change(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage
) -> None:
    proxy.next("lost_answer")
    with pytest.raises(ObjectChanged, match="no longer the expected version"):
        faulty.write(f"{folder}/x", b"mine", ABSENT)
    assert storage.read(f"{folder}/x") == b"mine"
    proxy.next("lost_answer")
    with pytest.raises(ObjectChanged):
        faulty.write(f"{folder}/x", b"mine too", storage.stat(f"{folder}/x").version)
    assert storage.read(f"{folder}/x") == b"mine too"


@pytest.mark.parametrize("kind", ["error", "denied", "reset"])
def test_failed_conditional_write_is_retried(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage, kind: str
) -> None:
    proxy.next(kind)
    first = faulty.write(f"{folder}/x", b"first", ABSENT)
    proxy.next(kind)
    second = faulty.write(f"{folder}/x", b"second", first.version)
    assert storage.stat(f"{folder}/x") == second
    assert storage.read(f"{folder}/x") == b"second"


@pytest.mark.parametrize("kind", ["error", "reset", "lost_answer"])
def test_retried_write_sends_the_whole_file_again(
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


def test_concurrent_requests_succeed_despite_random_faults(
    storage: Storage, folder: str, s3_server: LocalS3
) -> None:
    contents = {f"{folder}/{i}": random.Random(i).randbytes(20_000 + i) for i in range(60)}

    def write_and_read(uri: str) -> bool:
        written = through.write(uri, contents[uri])
        return through.stat(uri) == written and through.read(uri, written.version) == contents[uri]

    with FaultProxy(s3_server.endpoint_url, seed=1, rate=0.4, delay_seconds=0.01) as proxy:
        through = Storage(endpoint_url=proxy.url)
        with RetryCounter() as retries, ThreadPoolExecutor(12) as pool:
            assert all(pool.map(write_and_read, contents))
            assert sorted(names(through, folder)) == sorted(contents)
        assert set(proxy.injected) == set(ALL_KINDS)
        assert retries.counts.total() == proxy.injected.total() - proxy.injected["delay"]
        assert proxy.upstream_failures == 0
