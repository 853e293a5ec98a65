"""Behavior that is specific to S3, on the S3 server."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.local_s3 import LocalS3
from pipeline.storage import ABSENT, AccessDenied, Storage, StorageError, retry_counts
from tests.pipeline.storage.operations import names


def test_listing_of_several_pages_is_complete_and_in_order(
    storage: Storage, shared_bucket: str, many: list[str]
) -> None:
    assert names(storage, f"{shared_bucket}/many") == many


def test_listing_skips_folder_markers(storage: Storage, bucket: str, s3_server: LocalS3) -> None:
    assert names(storage, f"{bucket}/nothing/here") == []
    s3_server.client().put_object(Bucket=bucket.removeprefix("s3://"), Key="folder/", Body=b"")
    assert names(storage, bucket) == []


def test_unusual_keys_are_listed_unchanged(storage: Storage, bucket: str) -> None:
    for name in ["sp ace+%41 ü.tar", "日本/😀.tar", "a=b&c?d#e.tar"]:
        uri = f"{bucket}/{name}"
        storage.write(uri, name.encode())
        assert storage.read(uri) == name.encode()
        assert uri in names(storage, bucket)


def test_missing_bucket_is_reported_as_such(storage: Storage, s3_server: LocalS3) -> None:
    for action in (
        lambda: list(storage.list("s3://no-such-bucket/train")),
        lambda: storage.stat("s3://no-such-bucket/x"),
        lambda: storage.read("s3://no-such-bucket/x"),
        lambda: storage.write("s3://no-such-bucket/x", b"data"),
        lambda: storage.write("s3://no-such-bucket/x", b"data", ABSENT),
    ):
        with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
            action()


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"])
def test_credentials_with_a_line_break_fail_without_being_shown(
    storage: Storage, bucket: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "planted\nsecret\n")
    before = retry_counts()
    for action in (storage.list, storage.read, lambda uri: storage.write(uri, b"x")):
        with pytest.raises(StorageError, match="the AWS credentials contain a line break") as caught:
            list(action(f"{bucket}/x"))
        shown = "".join(traceback.format_exception(caught.value))
        assert "planted" not in shown
        assert "Signature" not in shown
    assert retry_counts() == before


def test_invalid_proxy_fails_without_being_shown(
    storage: Storage, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://user:pla/nted@127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("AWS_REGION", "elsewhere")  # so that a new client is created
    with pytest.raises(StorageError) as caught:
        storage.read(f"{bucket}/x")
    assert "proxy" in str(caught.value)
    assert "nted" not in str(caught.value)


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_rejected_credentials_fail_without_being_shown(
    storage: Storage, bucket: str, s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "wrong" * 5)
    for action in (storage.list, storage.read, lambda uri: storage.write(uri, b"x")):
        with pytest.raises(StorageError) as caught:
            list(action(f"{bucket}/x"))
        message = str(caught.value)
        assert f"{bucket}/x: " in message
        assert "credentials were rejected" in message or "access denied" in message
        assert s3_server.secret_key not in message
        assert "wrongwrong" not in message


def test_missing_credentials_error_names_the_variables(
    storage: Storage, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(
        StorageError, match=r"no usable AWS credentials.*AWS_ACCESS_KEY_ID.*storage\.anonymous"
    ):
        list(storage.list(bucket))


def test_unreachable_endpoint_is_named(s3_server: LocalS3) -> None:
    storage = Storage(endpoint_url="http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"s3://b/x: cannot reach the endpoint http://127.0.0.1:9"):
        list(storage.list("s3://b/x"))


def test_endpoint_can_come_from_the_environment(bucket: str) -> None:
    info = Storage().write(f"{bucket}/x", b"by AWS_ENDPOINT_URL_S3")
    assert Storage().read(info.uri) == b"by AWS_ENDPOINT_URL_S3"


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        (None, "https://s3.eu-west-1.amazonaws.com"),
        ("https://bucket.vpce-1a2b.s3.eu-west-1.vpce.amazonaws.com",) * 2,
        ("http://127.0.0.1:9000",) * 2,
    ],
)
def test_object_store_options_hold_endpoint_and_credentials(
    s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch, endpoint: str | None, expected: str | None
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    found = Storage(endpoint, "eu-west-1").object_store_options("s3://b/x")
    assert (found.get("endpoint_url"), found["region"]) == (expected, "eu-west-1")
    assert found["aws_access_key_id"] == s3_server.access_key
    assert found["aws_secret_access_key"] == s3_server.secret_key


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


@pytest.fixture(scope="session")
def public(s3_server: LocalS3) -> str:
    """The URI of a bucket that everybody can read, with one object."""
    s3_server.client().put_object(Bucket="public", Key="train/x", Body=b"public")
    return "s3://public"


def test_anonymous_access_needs_no_credentials(s3_server: LocalS3, public: str, no_credentials: None) -> None:
    storage = Storage(s3_server.endpoint_url, anonymous=True)
    assert names(storage, public) == [f"{public}/train/x"]
    assert storage.stat(f"{public}/train/x").size == 6
    assert storage.read(f"{public}/train/x") == b"public"


def test_anonymous_access_sends_no_credentials(
    s3_server: LocalS3, public: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "rejected")
    assert Storage(s3_server.endpoint_url, anonymous=True).read(f"{public}/train/x") == b"public"


def test_anonymous_access_to_a_private_bucket_is_denied(
    s3_server: LocalS3, bucket: str, no_credentials: None
) -> None:
    storage = Storage(s3_server.endpoint_url, anonymous=True)
    for action in (names, Storage.stat, lambda storage, uri: storage.write(uri, b"x")):
        with pytest.raises(AccessDenied, match=r"x: access denied: .*; see storage\.anonymous and storage\."):
            action(storage, f"{bucket}/x")  # type: ignore[operator]


@pytest.mark.parametrize("requester_pays", [True, False])
def test_every_request_says_who_pays(s3_server: LocalS3, bucket: str, requester_pays: bool) -> None:
    storage = Storage(s3_server.endpoint_url, request_timeout_s=59, requester_pays=requester_pays)
    sent = set[tuple[str, str | None, bool]]()

    def record(request: Any, event_name: str, **_: Any) -> None:
        payer, signed = request.headers.get("x-amz-request-payer"), request.headers["Authorization"]
        payer = payer.decode() if isinstance(payer, bytes) else payer
        sent.add((event_name.rpartition(".")[2], payer, b"x-amz-request-payer" in signed))

    storage._service(bucket)._client.meta.events.register("before-send.s3", record)  # type: ignore[union-attr]
    info = storage.write(f"{bucket}/folder/x", b"data", ABSENT)
    assert storage.read(info.uri) == b"data"
    assert storage.stat(info.uri) == info
    assert list(storage.list(bucket, prefix="fol")) == [info]
    assert list(storage.list_folders(bucket)) == [f"{bucket}/folder"]
    storage.delete(info.uri)
    operations = "PutObject", "GetObject", "HeadObject", "ListObjectsV2", "DeleteObject"
    payer = "requester" if requester_pays else None
    assert sent == {(operation, payer, requester_pays) for operation in operations}


def test_object_store_options_follow_the_access(s3_server: LocalS3, no_credentials: None) -> None:
    options = Storage(s3_server.endpoint_url, anonymous=True).object_store_options("s3://b/x")
    assert options["aws_skip_signature"] == "true"
    assert not {"aws_access_key_id", "aws_secret_access_key", "aws_request_payer"} & set(options)


def test_object_store_options_name_the_payer(s3_server: LocalS3) -> None:
    options = Storage(s3_server.endpoint_url, requester_pays=True).object_store_options("s3://b/x")
    assert options["aws_request_payer"] == "true"
    assert options["aws_access_key_id"] == s3_server.access_key


def test_object_store_accepts_the_options(
    s3_server: LocalS3, public: str, storage: Storage, no_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltalake = pytest.importorskip("deltalake")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    table = f"{public}/table"
    deltalake.write_deltalake(
        table, pa.table({"a": [1]}), storage_options=storage.object_store_options(table)
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    options = Storage(s3_server.endpoint_url, anonymous=True).object_store_options(table)
    assert deltalake.DeltaTable(table, storage_options=options).version() == 0
