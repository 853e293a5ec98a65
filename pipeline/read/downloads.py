"""Reader of the images of a table's rows: many downloads at a time, in limited memory."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipeline.predictions import download_error
from pipeline.read.limits import Deadline
from pipeline.read.samples import ReadOptions, Sample
from pipeline.read.shards import Shard
from pipeline.read.tables import row_samples
from pipeline.storage import (
    ABSENT,
    AccessDenied,
    BucketNotFound,
    ObjectChanged,
    ObjectNotFound,
    ObjectTooLarge,
    Storage,
    StorageError,
)

_MAX_PENDING_BYTES = 128 * 1024**2  # one image may be larger
_MAX_THREADS = 32
_HTTP, _BUCKETS = ("http://", "https://"), ("s3://", "gs://")
#: Failures of a bucket that are about one image. After others, a later attempt may succeed.
_OF_ONE_IMAGE = (AccessDenied, BucketNotFound, ObjectChanged, ObjectNotFound, ObjectTooLarge)
#: The size up to which images are downloaded concurrently. A larger image is downloaded when its turn comes.
_FIRST_BYTES = 2 * 1024**2


def read_rows(storage: Storage, shard: Shard, options: ReadOptions, deadline: Deadline) -> Iterator[Sample]:
    """Yields the samples of a shard of a table, in order.

    An image that cannot be downloaded is an error. A failure of a bucket that is not about one image raises
    `StorageError`, so that a later run reads the shard again.
    """
    del deadline  # each request has a time limit
    pending, used, expected = deque[tuple[Sample, int, Future[Any] | None]](), 0, _FIRST_BYTES
    window = 2 * options.concurrent_downloads
    threads = ThreadPoolExecutor(min(_MAX_THREADS, options.concurrent_downloads), thread_name_prefix="images")
    downloader = storage.downloader(options.concurrent_downloads, options.downloads_per_host)

    def start(sample: Sample, max_bytes: int) -> Future[Any]:
        assert sample.uri is not None
        if sample.uri.startswith(_HTTP):
            return downloader.download(sample.uri, max_bytes)
        version = None if sample.version == ABSENT else sample.version
        return threads.submit(_read, storage, sample.uri, version, max_bytes)

    def finish(sample: Sample, max_bytes: int, download: Future[Any] | None) -> Sample:
        nonlocal expected
        if download is None:
            return sample
        planned, sample.version = sample.version, None if sample.version == ABSENT else sample.version
        try:
            try:
                content, version = download.result()
            except ObjectTooLarge:
                if max_bytes == options.max_image_bytes:
                    raise
                content, version = start(sample, options.max_image_bytes).result()
                expected *= 2
            if planned not in (None, ABSENT, version):
                raise ObjectChanged(str(sample.uri))
        except StorageError as failure:
            if str(sample.uri).startswith(_BUCKETS) and not isinstance(failure, _OF_ONE_IMAGE):
                raise
            return sample.fail(download_error(failure))
        sample.image, sample.version = content, version
        return sample

    try:
        for sample in row_samples(shard):
            while pending and (len(pending) == window or used + expected > _MAX_PENDING_BYTES):
                used -= pending[0][1]
                yield finish(*pending.popleft())
            max_bytes = min(expected, options.max_image_bytes)
            pending.append((sample, max_bytes, None if sample.error else start(sample, max_bytes)))
            used += max_bytes
        while pending:
            yield finish(*pending.popleft())
    finally:
        threads.shutdown(cancel_futures=True)
        downloader.close()


def _read(storage: Storage, uri: str, version: str | None, max_bytes: int) -> tuple[bytes, str]:
    version = version or storage.stat(uri).version
    size = int(version.rpartition("-")[2])
    if size > max_bytes:
        raise ObjectTooLarge(uri, f"the object has {size:,} bytes, and the limit is {max_bytes:,} bytes")
    return storage.read(uri, version), version
