"""Behavior that is specific to Google Cloud Storage, on an emulator."""

from __future__ import annotations

import json
import sys
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from pipeline.storage import AccessDenied, Storage, StorageError
from tests.fault_proxy import FaultProxy
from tests.http_server import Answer, HttpServer
from tests.pipeline.storage.operations import OPERATIONS, RetryCounter, names


def test_missing_client_library_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pipeline.storage.gcs", raising=False)
    monkeypatch.setitem(sys.modules, "google.auth.exceptions", None)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")  # so that a new client is created
    with pytest.raises(StorageError, match=r"^gs://bucket/x: gs:// needs .* pip install 'cvt-label\[gcs\]'"):
        Storage().stat("gs://bucket/x")


def test_missing_bucket_is_reported_as_such(
    storage: Storage, gcs_emulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    for action in (
        lambda: list(storage.list("gs://no-such-bucket/train")),
        lambda: storage.stat("gs://no-such-bucket/x"),
        lambda: storage.write("gs://no-such-bucket/x", b"data"),
    ):
        with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
            action()


@pytest.mark.parametrize(
    "kind", ["error", "slow_down", "denied", "reset", "lost_answer", "truncated", "no_body"]
)
@pytest.mark.parametrize("operation", ["read", "write", "delete", "list", "stat"])
def test_transient_failures_are_retried_and_counted(
    storage: Storage, gcs_emulator: str, kind: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    info = storage.write(f"gs://emulated/{kind}-{operation}/x", b"some bytes")
    with FaultProxy(gcs_emulator) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        proxy.next(kind, kind, where=lambda request: "/b/emulated/o" in request.path)  # only objects
        with RetryCounter() as retries:
            result = OPERATIONS[operation](storage, info)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    assert retries.counts.total() == 2
    if operation == "delete":
        assert names(storage, info.uri) == []
    elif operation == "list":
        assert result == [info]
    else:
        assert result == (b"some bytes" if operation == "read" else storage.stat(info.uri))
        assert storage.read(info.uri) == b"some bytes"


def test_response_without_a_size_is_an_error(
    storage: Storage, gcs_emulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    info = storage.write("gs://emulated/no-size/x", b"data")
    monkeypatch.setattr("google.cloud.storage.Blob.size", None)
    for operation in ("stat", "list", "write"):
        with pytest.raises(StorageError, match="last with a malformed response: TypeError"):
            OPERATIONS[operation](storage, info)


@pytest.mark.parametrize("transport", [True, False])
def test_transient_credential_failures_are_retried(
    storage: Storage, gcs_emulator: str, transport: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow metadata server causes such failures."""
    credentials = pytest.importorskip("google.auth.credentials")
    errors = pytest.importorskip("google.auth.exceptions")
    client = pytest.importorskip("google.cloud.storage")
    from pipeline.storage.gcs import GoogleCloudStorage

    class SlowCredentials(credentials.Credentials):  # type: ignore[misc, name-defined]
        attempts = 0

        def refresh(self, request: object) -> None:
            self.attempts += 1
            if self.attempts <= 2:
                raise (
                    errors.TransportError("timed out")
                    if transport
                    else errors.RefreshError("try later", retryable=True)
                )
            self.token = "token"

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    info = storage.write(f"gs://emulated/credentials-{transport}", b"some bytes")
    google = GoogleCloudStorage(client.Client(project="test", credentials=SlowCredentials()))
    with RetryCounter() as retries:
        assert google.stat(info.uri) == info
    assert retries.counts.total() >= 1  # Google's client itself retries once


@pytest.mark.parametrize("requester_pays", [True, False])
def test_every_request_names_the_project_that_pays(
    gcs_emulator: str, monkeypatch: pytest.MonkeyPatch, requester_pays: bool
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "payer")
    storage = Storage(request_timeout_s=59, requester_pays=requester_pays)
    sent = list[tuple[str, list[str]]]()

    def record(response: Any, **_: Any) -> None:
        url = urlsplit(response.request.url)
        if "/o" in url.path:  # an object; Google's client itself also asks for the bucket's location
            sent.append((response.request.method, parse_qs(url.query).get("userProject", [])))

    client = storage._service("gs://emulated")._client  # type: ignore[union-attr]
    client._http.hooks["response"].append(record)
    info = storage.write("gs://emulated/paid/x", b"data")
    assert storage.read(info.uri) == b"data"
    assert list(storage.list("gs://emulated", prefix="paid/")) == [info]
    storage.delete(info.uri)
    assert {method for method, _ in sent} == {"POST", "PUT", "GET", "DELETE"}
    assert {tuple(projects) for _, projects in sent} == {("payer",) if requester_pays else ()}


def test_anonymous_access_needs_no_credentials(
    storage: Storage, gcs_emulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    info = storage.write("gs://emulated/public/x", b"data")
    for name in ("GOOGLE_CLOUD_PROJECT", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    public = Storage(anonymous=True)
    assert public.read(info.uri) == b"data"
    assert public._service("gs://emulated")._client.project is None  # type: ignore[union-attr]
    assert public.object_store_options(info.uri)["google_skip_signature"] == "true"


def test_missing_credentials_error_names_anonymous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/file")
    with pytest.raises(StorageError, match=r"no usable Google Cloud credentials: .*set storage\.anonymous"):
        Storage().stat("gs://bucket/x")


@pytest.mark.parametrize("status", [400, 403])
def test_denied_request_names_requester_pays(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("google.cloud.storage", reason="cvt-label[gcs] is not installed")
    message = "Bucket is a requester pays bucket but no user project provided."
    body = json.dumps({"error": {"code": status, "message": message}}).encode()
    with HttpServer() as server:
        server.add("/storage/v1/b/paid/o/x", Answer(body, status, {"Content-Type": "application/json"}))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        with pytest.raises(
            AccessDenied, match=r"no user project.*see storage\.anonymous and storage\.requester_pays"
        ):
            Storage().stat("gs://paid/x")
