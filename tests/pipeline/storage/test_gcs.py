"""What is Google Cloud Storage's own, on an emulator."""

from __future__ import annotations

import sys

import pytest

from pipeline.storage import Storage, StorageError
from tests.fault_proxy import FaultProxy
from tests.pipeline.storage.operations import OPERATIONS, Faults, names


def test_a_missing_client_library_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pipeline.storage.gcs", raising=False)
    monkeypatch.setitem(sys.modules, "google.auth.exceptions", None)
    with pytest.raises(StorageError, match=r"^gs://bucket/x: gs:// needs .* pip install 'cvt-label\[gcs\]'"):
        Storage().stat("gs://bucket/x")


def test_a_missing_bucket_of_google_is_called_a_missing_bucket(
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


@pytest.mark.parametrize("transport", [True, False])
def test_credentials_that_cannot_be_fetched_for_a_moment_are_asked_for_again(
    storage: Storage, gcs_emulator: str, transport: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a metadata server is slow to answer."""
    credentials = pytest.importorskip("google.auth.credentials")
    errors = pytest.importorskip("google.auth.exceptions")
    client = pytest.importorskip("google.cloud.storage")
    from pipeline.storage.gcs import GoogleCloudStorage

    class SlowToCome(credentials.Credentials):  # type: ignore[misc, name-defined]
        asked = 0

        def refresh(self, request: object) -> None:
            self.asked += 1
            if self.asked <= 2:
                raise (
                    errors.TransportError("timed out")
                    if transport
                    else errors.RefreshError("try later", retryable=True)
                )
            self.token = "token"

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    info = storage.write(f"gs://emulated/credentials-{transport}", b"some bytes")
    google = GoogleCloudStorage(client.Client(project="test", credentials=SlowToCome()))
    with Faults() as faults:
        assert google.stat(info.uri) == info
    assert faults.counts.total() >= 1  # Google's client asks again once by itself
