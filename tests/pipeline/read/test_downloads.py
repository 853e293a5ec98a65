"""Images of a table's rows: order, concurrency, memory, and failures of servers and buckets."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.local_s3 import LocalS3
from pipeline.predictions import ErrorCategory
from pipeline.read import ReadOptions, Sample, read_samples
from pipeline.read.samples import ShardError
from pipeline.storage import Storage
from tests.fault_proxy import FaultProxy
from tests.http_server import Answer, HttpServer
from tests.makers import category_of, list_shards, make_image
from tests.read_options import read_options

KIB = 1024


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.retrying.MAX_PAUSE_S", 0.01)


def read(
    folder: Path, uris: list[str], storage: Storage | None = None, options: ReadOptions | None = None
) -> list[Sample]:
    """Reads a table with these URIs."""
    (folder / "t.txt").write_text("\n".join(uris))
    storage = storage or Storage()
    [shard] = list_shards(storage, f"{folder}/t.txt", "table")
    return list(read_samples(storage, shard, options or ReadOptions()))


def test_images_keep_their_order_and_are_downloaded_concurrently(tmp_path: Path) -> None:
    with HttpServer() as server:
        uris = []
        for i in range(60):
            answer = Answer(make_image(i), headers={"ETag": f'"{i}"'}, delay_s=0.2 if i % 20 == 0 else 0.01)
            uris.append(server.add(f"/{i}.jpg", answer))
        found = read(tmp_path, uris, options=read_options(downloads_per_host=8))
        assert [sample.image for sample in found] == [make_image(i) for i in range(60)]
        assert [(sample.key, sample.uri) for sample in found] == list(zip(uris, uris, strict=True))
        assert [sample.version for sample in found] == [f"{i}-{len(make_image(i))}" for i in range(60)]
        assert 4 <= server.max_concurrent <= 8
        assert set(server.count().values()) == {1}


ANSWERS = {
    "404": (Answer(status=404), ErrorCategory.IMAGE_NOT_FOUND),
    "410": (Answer(status=410), ErrorCategory.IMAGE_NOT_FOUND),
    "403": (Answer(status=403), ErrorCategory.ACCESS_DENIED),
    "500": (Answer(status=500), ErrorCategory.DOWNLOAD_FAILED),
    "slow": (Answer(b"x", delay_s=1), ErrorCategory.DOWNLOAD_FAILED),
    "truncated": (Answer(b"x" * 10, length="20"), ErrorCategory.DOWNLOAD_FAILED),
    "reset": (Answer(reset=True), ErrorCategory.DOWNLOAD_FAILED),
    "loop": (Answer(status=302, headers={"Location": "/loop"}), ErrorCategory.DOWNLOAD_FAILED),
    "file": (Answer(status=302, headers={"Location": "file:///etc/hosts"}), ErrorCategory.DOWNLOAD_FAILED),
    "large": (Answer(b"x" * 300 * KIB), ErrorCategory.FILE_TOO_LARGE),
    "large-without-length": (Answer(b"x" * 300 * KIB, length=""), ErrorCategory.FILE_TOO_LARGE),
}


def test_failed_downloads_are_error_rows_with_their_cause(tmp_path: Path) -> None:
    with HttpServer() as server:
        good = server.add("/good", Answer(make_image(1)))
        uris = [server.add(f"/{name}", answer) for name, (answer, _) in ANSWERS.items()]
        down = "http://127.0.0.1:1/host-is-down.jpg"
        options = read_options(max_image_bytes=200 * KIB)
        first, *bad, last = read(tmp_path, [good, *uris, down, good], Storage(request_timeout_s=0.3), options)
    assert first.image == last.image == make_image(1)
    expected = [category for _, category in ANSWERS.values()] + [ErrorCategory.DOWNLOAD_FAILED]
    assert [category_of(sample.error) for sample in bad] == expected
    assert all(uri in str(sample.error) for uri, sample in zip([*uris, down], bad, strict=True))
    assert "HTTP 500" in str(bad[3].error)


def test_transient_failures_and_redirects_are_followed(tmp_path: Path) -> None:
    with HttpServer() as server:
        good = Answer(make_image(1))
        uris = [
            server.add("/busy", Answer(status=429), good),
            server.add("/failing", Answer(status=503), good),
            server.add("/cut", Answer(b"x", length="9"), good),
            server.add("/moved", Answer(status=302, headers={"Location": "/there"})),
        ]
        server.add("/there", good)
        assert [sample.image for sample in read(tmp_path, uris)] == [make_image(1)] * 4


def test_large_images_wait_for_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.read.downloads._FIRST_BYTES", 100 * KIB)
    monkeypatch.setattr("pipeline.read.downloads._MAX_PENDING_BYTES", 300 * KIB)
    sizes = [50, 1000, 50, 50, 150, 50, 150]
    with HttpServer() as server:
        uris = [server.add(f"/{i}", Answer(b"x" * size * KIB)) for i, size in enumerate(sizes)]
        found = read(tmp_path, uris)
        assert [len(sample.image or b"") for sample in found] == [size * KIB for size in sizes]
        assert server.max_concurrent <= 3
        # After the first image over the limit, the limit is 200 KiB for the images that follow.
        assert server.count() == {f"/{i}": 2 if i == 1 else 1 for i in range(7)}
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.jpg").write_bytes(b"x" * size * KIB)
    found = read(tmp_path, [f"{i}.jpg" for i in range(7)])
    assert [len(sample.image or b"") for sample in found] == [size * KIB for size in sizes]


def test_unavailable_bucket_fails_the_shard_and_not_its_images(
    s3_server: LocalS3, bucket: str, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write(f"{bucket}/a.jpg", make_image(1))
    (tmp_path / "t.txt").write_text(f"{bucket}/a.jpg\n{bucket}/missing.jpg\n{bucket}/a.jpg")
    with FaultProxy(s3_server.endpoint_url) as proxy:
        faulty = Storage(endpoint_url=proxy.url)
        [shard] = list_shards(faulty, str(tmp_path), "table")
        found = list(read_samples(faulty, shard, ReadOptions()))
        assert [sample.image for sample in found] == [make_image(1), None, make_image(1)]
        assert category_of(found[1].error) is ErrorCategory.IMAGE_NOT_FOUND
        monkeypatch.setattr("pipeline.storage.buckets.ATTEMPTS", 2)
        monkeypatch.setattr("pipeline.storage.s3.ATTEMPTS", 2)
        proxy.always("slow_down")
        with pytest.raises(ShardError) as caught:
            list(read_samples(faulty, shard, ReadOptions()))
        assert caught.value.transient
        assert "reduce your request rate" in str(caught.value)
