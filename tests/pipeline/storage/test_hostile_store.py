"""A store that drips, cuts, floods or lies: the result is right, or a `StorageError` within the deadline."""

from __future__ import annotations

import io
import itertools
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipeline.storage import ABSENT, ObjectChanged, ObjectInfo, Storage, StorageError, Versioned
from pipeline.storage.buckets import Page
from pipeline.storage.limits import MAX_RESPONSE_BYTES
from pipeline.storage.retrying import retry_counts
from pipeline.storage.s3 import S3
from tests.fault_proxy import DROPPED_HEADERS, LIES, SLOW_KINDS, FaultProxy
from tests.pipeline.storage.operations import OPERATIONS, RetryCounter, names

TIMEOUT_S = 0.05  # of a request; there are up to four attempts
CONTENT = b"some bytes"

HOSTILE_OPERATIONS: dict[str, Callable[[Storage, ObjectInfo], Any]] = OPERATIONS | {
    "read_latest": lambda storage, info: storage.read_latest(info.uri, io.BufferedReader.read),
    "update": lambda storage, info: storage.update(info.uri, lambda version: CONTENT, info.version),
    "create": lambda storage, info: storage.write(f"{info.uri}-new", CONTENT, ABSENT),
    "list_folders": lambda storage, info: list(storage.list_folders(info.uri.rpartition("/")[0])),
}
#: The operations that a kind of fault affects. The other tests of faults cover connections that end.
AFFECTED = {
    "refused": [*HOSTILE_OPERATIONS],
    **{kind: [*HOSTILE_OPERATIONS] for kind in SLOW_KINDS},
    "stall": ["read", "stat", "list", "delete"],  # before it sends a body, botocore waits for 1 s
    "continue_cut": ["write", "create"],
    "slow_upload": ["write", "update"],
    **{kind: ["read", "stat", "write", "read_latest", "update"] for kind in LIES if "etag" in kind},
    **{kind: ["read", "list"] for kind in ("longer", "no_length", "shorter", "sign_in_page")},
    "zero_length": ["read_latest"],
    **{kind: ["read", "read_latest"] for kind in ("other_range", "other_size", "ignored_range")},
    **{kind: ["list"] for kind in ("wrong_number", "other_keys", "no_token", "same_token", "empty_pages")},
    "ignored_conditions": ["create", "update"],
}
CASES = [(kind, operation) for kind, operations in AFFECTED.items() for operation in operations]


def test_cases_cover_all_kinds() -> None:
    elsewhere = {"entity_bomb"}  # tests/pipeline/test_hostile_inputs.py
    assert {*SLOW_KINDS, *LIES, *DROPPED_HEADERS} - elsewhere < AFFECTED.keys()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.retrying.MAX_PAUSE_S", 0.0)


@pytest.fixture
def hostile(proxy: FaultProxy) -> Storage:
    """Storage behind the proxy, with short deadlines."""
    return Storage(endpoint_url=proxy.url, request_timeout_s=TIMEOUT_S, min_bytes_per_s=1e6)


@pytest.mark.parametrize(("kind", "operation"), CASES)
def test_result_is_right_or_an_error_within_the_deadline(
    storage: Storage, folder: str, proxy: FaultProxy, hostile: Storage, kind: str, operation: str
) -> None:
    info = storage.write(f"{folder}/x", CONTENT)
    started = time.monotonic()
    proxy.always(kind)
    try:
        result = HOSTILE_OPERATIONS[operation](hostile, info)
    except StorageError as error:
        result = error
    assert time.monotonic() - started < 15  # four requests of 0.05 s, or 20 quick ones, on a busy machine
    if isinstance(result, StorageError):
        assert result.uri.startswith(folder)
    elif (kind, operation) == ("flood", "stat"):
        assert result.size == 10**12  # nothing contradicts this size yet
    elif kind == "other_etag":  # and nothing this version
        assert (result.content if operation == "read_latest" else result.size) in (CONTENT, len(CONTENT))
    else:
        expected: dict[str, object] = {"read": CONTENT, "list": [info], "list_folders": [], "delete": None}
        expected["create"] = ObjectInfo(f"{info.uri}-new", info.size, info.version)
        expected["read_latest"] = Versioned(CONTENT, info.version)
        assert result == expected.get(operation, info)


def test_slow_response_is_an_error_with_the_bytes_received(
    storage: Storage, folder: str, proxy: FaultProxy, hostile: Storage
) -> None:
    info = storage.write(f"{folder}/x", CONTENT)
    proxy.always("drip")
    patient = replace(hostile, request_timeout_s=0.3)
    with RetryCounter() as retries, pytest.raises(StorageError) as caught:
        patient.read(info.uri, info.version)
    assert re.search(
        r"failed after retries, .* too slow: sent [1-9]\d* and received [1-9]\d* bytes in 0\.",
        str(caught.value),
    )
    assert retries.counts == {"RequestLimitError": 3}


@pytest.mark.parametrize("operation", ["read", "write", "list", "stat", "delete"])
def test_slow_request_succeeds_on_a_retry(
    storage: Storage, folder: str, proxy: FaultProxy, operation: str
) -> None:
    info = storage.write(f"{folder}/x", CONTENT)
    proxy.next("drip", where=lambda request: request.range is not None or operation != "read")
    patient = Storage(endpoint_url=proxy.url, request_timeout_s=0.4)
    with RetryCounter() as retries:
        result = OPERATIONS[operation](patient, info)
    assert result == {"read": CONTENT, "list": [info], "delete": None}.get(operation, info)
    assert retries.counts["RequestLimitError"] >= 1


def test_throughput_and_not_only_time_is_limited(storage: Storage, folder: str, proxy: FaultProxy) -> None:
    """A request with many bytes may take longer than the timeout, but only in proportion to its bytes."""
    info = storage.write(f"{folder}/x", bytes(20))
    proxy.always("drip_body", where=lambda request: request.method == "GET")  # 20 bytes in 0.4 s
    patient = Storage(endpoint_url=proxy.url, request_timeout_s=0.3, min_bytes_per_s=1000)
    assert patient.read(info.uri, info.version) == bytes(20)  # the head has more than 400 bytes
    strict = Storage(endpoint_url=proxy.url, request_timeout_s=0.3, min_bytes_per_s=1e6)
    with pytest.raises(StorageError, match="too slow"):
        strict.read(info.uri, info.version)


def test_slow_upload_is_an_error(folder: str, proxy: FaultProxy, hostile: Storage) -> None:
    proxy.always("slow_upload")
    with pytest.raises(StorageError, match="too slow: sent"):
        hostile.write(f"{folder}/x", bytes(8 * 1024**2))


def test_flood_ends_at_the_limit(folder: str, storage: Storage, proxy: FaultProxy) -> None:
    info = storage.write(f"{folder}/x", CONTENT)
    proxy.always("flood")
    patient = Storage(endpoint_url=proxy.url, request_timeout_s=10)
    with pytest.raises(StorageError, match=f"the response has more than {MAX_RESPONSE_BYTES:,} bytes"):
        list(patient.list_folders(folder))
    with pytest.raises(StorageError, match=r"IncompleteRead"):  # only the range is read
        patient.read(info.uri, info.version)


def test_store_with_weak_etags_works(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage
) -> None:
    info = storage.write(f"{folder}/x", CONTENT)
    proxy.always("weak_etag")
    assert faulty.stat(info.uri) == info
    assert faulty.read(info.uri) == CONTENT
    found = faulty.read_latest(info.uri, io.BufferedReader.read)
    assert found is not None
    assert found.version == info.version
    new = faulty.update(info.uri, lambda version: b"other", info.version)
    assert new == storage.stat(info.uri)
    with pytest.raises(ObjectChanged):
        faulty.read(info.uri, info.version)


def test_versions_never_mix_behind_weak_etags(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage
) -> None:
    info = storage.write(f"{folder}/x", b"a" * 9_000_000)
    proxy.always("weak_etag")
    with faulty.open(info.uri) as stream:
        assert stream.read(10) == b"a" * 10
        storage.write(info.uri, b"b" * 9_000_000)
        with pytest.raises(ObjectChanged, match="no longer the expected version"):
            stream.read()


@pytest.mark.parametrize(
    ("kind", "method"), [("refused", "PUT"), ("other_etag", "GET")], ids=["refused writes", "GET is not HEAD"]
)
def test_refusal_of_the_current_version_ends_after_20_attempts(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage, kind: str, method: str
) -> None:
    info = storage.write(f"{folder}/x", CONTENT)
    proxy.always(kind, where=lambda request: request.method == method)
    with pytest.raises(StorageError, match="the store refused 20 requests for the version that") as caught:
        faulty.update(info.uri, lambda version: faulty.read(info.uri, version) + b"!")
    assert type(caught.value) is StorageError
    assert sum(request.method == method for request in proxy.seen) == 20


def test_pauses_between_attempts_grow(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.retrying.MAX_PAUSE_S", 10.0)
    paused: list[float] = []
    monkeypatch.setattr("pipeline.storage.retrying.time.sleep", paused.append)
    info = storage.write(f"{folder}/x", CONTENT)
    proxy.always("refused", where=lambda request: request.method == "PUT")
    with pytest.raises(StorageError):
        faulty.update(info.uri, lambda version: b"mine")
    assert len(paused) == 18  # none after the first attempt, whose expected version may be old
    assert 0.25 <= paused[0] <= 0.5
    assert 60 < sum(paused) < 180


def test_store_that_ignores_conditions_is_refused_once_it_writes(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage
) -> None:
    proxy.always("ignored_conditions")
    suspect = replace(faulty, min_bytes_per_s=54_321)  # no other test has proven its bucket
    for _ in range(2):  # the refusal is not remembered as success
        with pytest.raises(
            StorageError, match=r"ignores the conditions .* storage\.conditional_writes to false"
        ):
            suspect.write(f"{folder}/x", CONTENT, ABSENT)
        assert names(storage, folder) == []
    single = replace(suspect, conditional_writes=False)
    info = single.write(f"{folder}/x", CONTENT, ABSENT)
    with pytest.raises(ObjectChanged):
        single.write(f"{folder}/x", b"other", ABSENT)
    with pytest.raises(ObjectChanged):
        single.delete(f"{folder}/x", "0-1")
    assert single.update(info.uri, lambda version: b"other") == storage.stat(info.uri)
    single.delete(info.uri, storage.version(info.uri))
    single.delete(info.uri, info.version)
    assert names(storage, folder) == []


def test_store_that_rejects_conditions_is_named(folder: str, proxy: FaultProxy, faulty: Storage) -> None:
    proxy.always("not_implemented", where=lambda request: request.method == "PUT")
    with pytest.raises(StorageError, match=r"NotImplemented|storage\.conditional_writes"):
        faulty.write(f"{folder}/x", CONTENT, ABSENT)
    assert len(proxy.seen) == 1


def test_conditions_are_probed_once_per_bucket(folder: str, proxy: FaultProxy, faulty: Storage) -> None:
    distinct = replace(faulty, min_bytes_per_s=12_345)  # no other test has proven its bucket
    distinct.write(f"{folder}/x", CONTENT, ABSENT)
    assert [request.method for request in proxy.seen] == ["PUT"] * 3
    distinct.write(f"{folder}/y", CONTENT, ABSENT)
    assert len(proxy.seen) == 4


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("no_token", "no new token"),
        ("same_token", "no new token|repeated"),
        ("empty_pages", "101 pages in a row are empty"),
        ("other_keys", "outside of the folder"),
    ],
)
def test_listing_without_end_names_the_bucket(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage, kind: str, problem: str
) -> None:
    storage.write(f"{folder}/x", CONTENT)
    proxy.always(kind)
    with pytest.raises(StorageError, match=f"listing of bucket 'shared-by-tests' is invalid: .*({problem})"):
        list(faulty.list(folder))


def test_listing_in_any_order_is_accepted_but_no_cycle_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {None: (["s3://b/b/"], "1"), "1": (["s3://b/\U0001f600/", "s3://b/\uff21/"], "2")}
    pages["2"] = (["s3://b/a/"], None)
    service = S3(None)
    monkeypatch.setattr(service, "_page", lambda start, delimiter, token, limit: Page([], *pages[token]))
    assert [*service.list_folders("s3://b")] == [
        *("s3://b/b", "s3://b/\U0001f600", "s3://b/\uff21", "s3://b/a")
    ]
    pages["2"] = (["s3://b/a/"], "1")
    with pytest.raises(StorageError, match="no new token"):
        list(service.list_folders("s3://b"))


def test_folders_after_many_pages_of_objects_are_listed(
    storage: Storage, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.buckets._MAX_EMPTY_PAGES", 0)
    for name in (*map(str, range(3)), "x/y"):
        storage.write(f"{folder}/{name}", CONTENT)
    service = storage._service(folder)
    assert isinstance(service, S3)
    page = service._page
    monkeypatch.setattr(
        service, "_page", lambda start, delimiter, token, limit: page(start, delimiter, token, 1)
    )
    assert list(service.list_folders(folder)) == [f"{folder}/x"]


def test_refused_write_after_a_successful_one_leaves_no_object(
    storage: Storage, folder: str, proxy: FaultProxy, faulty: Storage
) -> None:
    """The store has `If-None-Match`, but not `If-Match`."""
    puts = itertools.count()
    proxy.always("not_implemented", where=lambda request: request.method == "PUT" and next(puts) > 0)
    with pytest.raises(StorageError, match=r"see storage\.conditional_writes"):
        replace(faulty, min_bytes_per_s=12_346).write(f"{folder}/x", CONTENT, ABSENT)
    assert len(proxy.seen) == 3  # the write, the refused one, the deletion
    assert names(storage, folder) == []


def test_name_that_is_not_utf8_is_refused_without_retries(storage: Storage, folder: str) -> None:
    before = retry_counts()
    for operation in (storage.stat, storage.version, lambda uri: list(storage.list(uri))):
        with pytest.raises(StorageError, match=r"\\udcff.* is not valid UTF-8"):
            operation(f"{folder}/a\udcff")
    assert retry_counts() == before


@pytest.mark.parametrize("size", [-1, 10**30])
def test_impossible_size_in_a_listing_names_the_object(
    storage: Storage, bucket: str, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    info = storage.write(f"{bucket}/in/x", CONTENT)
    client = storage._service(bucket)._client
    listed = client.list_objects_v2

    def lie(**arguments: object) -> object:
        page = listed(**arguments)
        return page | {"Contents": [found | {"Size": size} for found in page["Contents"]]}

    monkeypatch.setattr(client, "list_objects_v2", lie)
    with pytest.raises(StorageError, match=rf"the size {size} of {info.uri} is invalid"):
        list(storage.list(f"{bucket}/in"))


def test_object_over_the_size_limit_is_not_read(storage: Storage, root: str) -> None:
    info = storage.write(f"{root}/x", CONTENT)
    for read in (
        lambda: storage.read(info.uri, max_bytes=9),
        lambda: storage.read(info.uri, info.version, max_bytes=9),
        lambda: storage.read_latest(info.uri, io.BufferedReader.read, max_bytes=9),
    ):
        with pytest.raises(StorageError, match="has 10 bytes, more than the limit of 9 bytes"):
            read()
    assert storage.read(info.uri, max_bytes=10) == CONTENT


def test_gcs_emulator_ignores_conditions_and_is_refused(
    gcs_emulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    with pytest.raises(StorageError, match="ignores the conditions of writes"):
        Storage().write("gs://emulated/conditions", CONTENT, ABSENT)


@pytest.mark.parametrize("operation", ["read", "list", "write", "stat"])
def test_gcs_requests_are_limited(
    storage: Storage, gcs_emulator: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    info = storage.write("gs://emulated/slow/x", CONTENT)
    with FaultProxy(gcs_emulator) as slow:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", slow.url)
        slow.always("drip")
        with pytest.raises(StorageError, match="RequestLimitError: the request is too slow: sent"):
            OPERATIONS[operation](Storage(request_timeout_s=0.05, min_bytes_per_s=1e6), info)
