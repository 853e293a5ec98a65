"""Iceberg tables in a REST catalog: that of the S3 server, which has tables in table buckets."""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from jobs import local_s3
from jobs.local_s3 import LocalS3
from tests.pipeline.publish.tables import Dataset, Datasets, WatchedStorage, needs_format, reload_catalogs

pytestmark = pytest.mark.slow

needs_format("iceberg")


@pytest.fixture(scope="module")
def server_and_port() -> Iterator[tuple[LocalS3, int]]:
    """An S3 server, and the port of its REST catalog."""
    port = random.choice(range(22_000, 32_000))
    options = [each.replace("iceberg=0", f"iceberg={port}") for each in local_s3._OPTIONS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_s3, "_OPTIONS", options)
        with LocalS3() as server:
            yield server, port


@pytest.fixture
def dataset(server_and_port: tuple[LocalS3, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A dataset with embeddings, and an empty table bucket for its table."""
    server, port = server_and_port
    keys = {"aws_access_key_id": server.access_key, "aws_secret_access_key": server.secret_key}
    client = boto3.client("s3tables", endpoint_url=server.endpoint_url, region_name="us-east-1", **keys)
    bucket = f"tables-{secrets.token_hex(4)}"
    client.create_table_bucket(name=bucket)
    properties = {
        "TYPE": "rest",
        "URI": f"http://127.0.0.1:{port}",
        "OAUTH2_SERVER_URI": f"http://127.0.0.1:{port}/v1/oauth/tokens",
        "WAREHOUSE": f"s3://{bucket}",
        "CREDENTIAL": f"{server.access_key}:{server.secret_key}",
        "S3__ENDPOINT": server.endpoint_url,
        "S3__ACCESS_KEY_ID": server.access_key,
        "S3__SECRET_ACCESS_KEY": server.secret_key,
        "S3__REGION": "us-east-1",
    }
    dataset = Dataset(str(tmp_path), format="iceberg", embedding="float16")
    for name, value in properties.items():
        monkeypatch.setenv(f"PYICEBERG_CATALOG__REST__{name}", value)
    reload_catalogs()
    dataset.to = "iceberg:rest.ns.table"
    return dataset


def test_publications_add_replace_and_remove_shards(dataset: Dataset) -> None:
    dataset.label(a=5, b=6, c=4)
    dataset.publish()
    assert dataset.published() == dataset.labels()
    dataset.label(b=7, d=3, remove=["c"])
    done = dataset.publish()
    assert (len(done.added), len(done.replaced), len(done.removed)) == (2, 1, 1)
    assert dataset.published() == dataset.labels()
    assert [operation for _, operation in dataset.history()] == ["append", "overwrite"]
    assert dataset.publish().published_at is None


def test_concurrent_publications_of_two_datasets_succeed(dataset: Dataset) -> None:
    """The second dataset is published just before the commit of the first."""
    both = Datasets(dataset)
    others = iter([both.two])

    def publish_other(uri: str) -> None:
        if other := next(others, None):
            other.publish()

    both.one.publish(WatchedStorage(before=publish_other))
    assert both.one.published() == both.labels()
    assert len(both.one.history()) == 2
