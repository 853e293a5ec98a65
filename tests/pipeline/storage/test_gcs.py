"""Behavior that is specific to Google Cloud Storage, on an emulator."""

from __future__ import annotations

import sys

import pytest

from pipeline.storage import Storage, StorageError
from tests.fault_proxy import FaultProxy
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
