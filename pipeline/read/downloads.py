"""Reader of images that are objects of their own: many downloads at a time, in limited memory."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from typing import Any

from pipeline.predictions import download_error
from pipeline.read.samples import ReadOptions, Sample
from pipeline.read.shards import Shard
from pipeline.storage import (
    ABSENT,
    AccessDenied,
    BucketNotFound,
    ObjectChanged,
    ObjectInfo,
    ObjectNotFound,
    ObjectTooLarge,
    Storage,
    StorageError,
)

_MAX_PENDING_BYTES = 128 * 1024**2  # one image may be larger
_MAX_THREADS = 32
_HTTP, _BUCKETS = ("http://", "https://"), ("s3://", "gs://")
#: Failures that are about one image: of a listed object, and of an object that a table names.
_OF_LISTED_IMAGE = (ObjectChanged, ObjectNotFound, ObjectTooLarge)
_OF_IMAGE = (*_OF_LISTED_IMAGE, AccessDenied, BucketNotFound)
#: The size up to which images of unknown size are downloaded concurrently. A larger image waits for its turn.
_FIRST_BYTES = 2 * 1024**2


def read_images(
    storage: Storage, shard: Shard, samples: Sequence[Sample], options: ReadOptions
) -> Iterator[Sample]:
    """Yields the samples of image files or of rows of a table with their images, in order.

    An image that cannot be downloaded is an error. A failure of a store that is not about one image raises
    `StorageError`, so that a later run reads the shard again.
    """
    pending, used, expected = deque[tuple[Sample, int, Future[Any] | None]](), 0, _FIRST_BYTES
    window = 2 * options.read.concurrent_downloads

    def start(sample: Sample, max_bytes: int) -> Future[Any]:
        assert sample.uri is not None
        if sample.uri.startswith(_HTTP):
            download: Future[Any] = downloader().download(sample.uri, max_bytes)
            return download
        version = None if sample.version == ABSENT else sample.version
        return threads.submit(_read, storage, sample.uri, version, max_bytes)

    def finish(sample: Sample, max_bytes: int, download: Future[Any] | None) -> Sample:
        nonlocal expected
        if download is None:
            return sample
        planned, sample.version = sample.version, None if sample.version == ABSENT else sample.version
        uri = str(sample.uri)
        try:
            try:
                content, version = download.result()
            except ObjectTooLarge:
                if max_bytes == options.input.max_image_bytes:
                    raise
                content, version = start(sample, options.input.max_image_bytes).result()
                expected = max(expected, 2 * max_bytes)
            if planned not in (None, ABSENT, version):
                raise ObjectChanged(uri)
        except StorageError as failure:
            is_of_store = bool(shard.members) or uri.startswith(_BUCKETS)
            if is_of_store and not isinstance(failure, _OF_LISTED_IMAGE if shard.members else _OF_IMAGE):
                raise
            return sample.fail(download_error(failure))
        sample.image, sample.version = content, version
        return sample

    with ExitStack() as stack:
        threads = ThreadPoolExecutor(min(_MAX_THREADS, options.read.concurrent_downloads), "images")
        stack.callback(threads.shutdown, cancel_futures=True)

        @cache
        def downloader() -> Any:
            limits = options.read.concurrent_downloads, options.read.downloads_per_host
            return stack.enter_context(storage.downloader(*limits))

        for sample in samples:
            size = 0  # unknown
            if sample.version not in (None, ABSENT):
                size = ObjectInfo.of_version(str(sample.uri), str(sample.version)).size
                if error := options.size_error(size):
                    sample.fail(error)
            while pending and (len(pending) == window or used + (size or expected) > _MAX_PENDING_BYTES):
                used -= pending[0][1]
                yield finish(*pending.popleft())
            max_bytes = 0 if sample.error else size or min(expected, options.input.max_image_bytes)
            pending.append((sample, max_bytes, None if sample.error else start(sample, max_bytes)))
            used += max_bytes
        while pending:
            yield finish(*pending.popleft())


def _read(storage: Storage, uri: str, version: str | None, max_bytes: int) -> tuple[bytes, str]:
    version = version or storage.stat(uri).version
    return storage.read(uri, version, max_bytes), version
