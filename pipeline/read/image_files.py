"""Reading groups of image files, each file being a sample."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.read.samples import ReadOptions, Sample
from pipeline.read.shards import Shard
from pipeline.storage import ObjectChanged, ObjectInfo, ObjectNotFound, Storage, name_below

_FETCHES = 8  # images fetched at once


def read_images(storage: Storage, shard: Shard, options: ReadOptions) -> Iterator[Sample]:
    """Yields the samples of a group of image files, in the order of its members."""
    folder = shard.uri.rpartition("/")[0]

    def fetch(info: ObjectInfo) -> Sample:
        key = name_below(folder, info.uri)
        if error := options.size_error(info.size):
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
            pool.shutdown(cancel_futures=True)
