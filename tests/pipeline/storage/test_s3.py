"""What is S3's own, on the real S3 server."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from jobs.local_s3 import LocalS3
from pipeline.storage import ABSENT, Storage, StorageError, retry_counts
from tests.pipeline.storage.operations import names


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
        with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
            action()


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"])
def test_credentials_with_a_line_break_are_told_at_once_without_showing_them(
    storage: Storage, bucket: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "planted\nsecret\n")
    before = retry_counts()
    for action in (storage.list, storage.read, lambda uri: storage.write(uri, b"x")):
        with pytest.raises(StorageError, match="the AWS credentials hold a line break") as caught:
            list(action(f"{bucket}/x"))
        shown = "".join(traceback.format_exception(caught.value))
        assert "planted" not in shown
        assert "Signature" not in shown
    assert retry_counts() == before


def test_a_proxy_that_is_none_is_told_without_showing_it(
    storage: Storage, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://user:pla/nted@127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("AWS_REGION", "elsewhere")  # so that the client is made anew
    with pytest.raises(StorageError) as caught:
        storage.read(f"{bucket}/x")
    assert "proxy" in str(caught.value)
    assert "nted" not in str(caught.value)


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_rejected_credentials_are_told_without_showing_them(
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


def test_missing_credentials_are_told_with_what_to_set(
    storage: Storage, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"no usable AWS credentials.*AWS_ACCESS_KEY_ID"):
        list(storage.list(bucket))


def test_an_endpoint_that_nobody_serves_is_named(s3_server: LocalS3) -> None:
    storage = Storage(endpoint_url="http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"s3://b/x: the endpoint http://127.0.0.1:9 can't be reached"):
        list(storage.list("s3://b/x"))


def test_the_endpoint_may_come_from_the_environment(bucket: str) -> None:
    info = Storage().write(f"{bucket}/x", b"by AWS_ENDPOINT_URL_S3")
    assert Storage().read(info.uri) == b"by AWS_ENDPOINT_URL_S3"


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        (None, None),  # Amazon's own, which other clients know
        ("https://bucket.vpce-1a2b.s3.eu-west-1.vpce.amazonaws.com",) * 2,
        ("http://127.0.0.1:9000",) * 2,
    ],
)
def test_other_clients_are_told_how_s3_is_reached(
    s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch, endpoint: str | None, told: str | None
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    found = Storage(endpoint, "eu-west-1").object_store_options("s3://b/x")
    assert (found.get("endpoint_url"), found["region"]) == (told, "eu-west-1")
    assert found["aws_access_key_id"] == s3_server.access_key
    assert found["aws_secret_access_key"] == s3_server.secret_key
