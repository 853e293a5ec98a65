"""Readers: a shard in, its samples out, one at a time, in the same order every time.

WebDataset tars, Parquet files with image bytes, and groups of loose images. Nothing is decoded here,
and pickles are never loaded. A bad sample is a sample with an error; a bad shard is a `ShardError`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.read.samples import ReadOptions, Sample, too_large
from pipeline.read.shards import Shard
from pipeline.storage import ObjectChanged, ObjectInfo, ObjectNotFound, Storage, name_below

_FETCHES = 8  # loose images fetched at once


# Loose images ------------------------------------------------------------------------------------


def read_images(storage: Storage, shard: Shard, options: ReadOptions) -> Iterator[Sample]:
    folder = shard.uri.rpartition("/")[0]

    def fetch(info: ObjectInfo) -> Sample:
        key = name_below(folder, info.uri)
        if info.size > options.max_image_bytes:
            error = too_large("image", info.size, options.max_image_bytes)
            return Sample(key, None, error=error)
        try:
            return Sample(key, storage.read(info.uri, info.version))
        except (ObjectNotFound, ObjectChanged) as failure:
            return Sample(key, None, error=str(failure))

    pending: deque[Future[Sample]] = deque()
    with ThreadPoolExecutor(_FETCHES) as pool:
        try:
            for info in shard.members:
                pending.append(pool.submit(fetch, info))
                if len(pending) == 2 * _FETCHES:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
