"""A folder on each storage service, and the S3 server behind a proxy that injects faults."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs.local_s3 import LocalS3
from pipeline.storage import Storage
from tests.fault_proxy import FaultProxy


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.retrying.MAX_PAUSE_S", 0.01)


@pytest.fixture(scope="session")
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
    """A writable folder on each service."""
    if request.param == "s3":
        return str(request.getfixturevalue("folder"))
    if request.param == "local":
        return str(request.getfixturevalue("tmp_path"))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("gcs_emulator"))
    return f"gs://emulated/{request.node.name}"


@pytest.fixture(scope="session")
def shared_bucket(s3_server: LocalS3) -> str:
    s3_server.create_bucket("shared-by-tests")
    return "s3://shared-by-tests"


@pytest.fixture
def folder(shared_bucket: str) -> str:
    """The URI of a new folder; creating a bucket takes longer."""
    return f"{shared_bucket}/{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def many(shared_bucket: str) -> list[str]:
    """All URIs of a folder with more objects than a listing page, which has 1000."""
    uris = [f"{shared_bucket}/many/{i:05d}" for i in range(1001)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda uri: Storage().write(uri, b""), uris))
    return uris


@pytest.fixture(scope="session")
def shared_proxy(s3_server: LocalS3) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """A proxy of the S3 server that forwards all requests, except for the faults that a test schedules."""
    shared_proxy.clear()
    yield shared_proxy
    assert shared_proxy.upstream_failures == 0


@pytest.fixture
def faulty(proxy: FaultProxy) -> Storage:
    """Storage that reaches the S3 server through the proxy."""
    return Storage(endpoint_url=proxy.url)


@pytest.fixture
def storage(s3_server: LocalS3) -> Storage:
    """Storage that reaches the S3 server (and local files and Google Cloud Storage)."""
    return Storage(endpoint_url=s3_server.endpoint_url)
