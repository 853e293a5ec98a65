"""Reading a shard: its samples, one at a time, in the same order every time.

A bad sample is a sample with an error; a bad shard is a `ShardError`. Pickles are never loaded.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.predictions import ErrorCategory, sample_error
from pipeline.read.parquet import read_parquet
from pipeline.read.samples import ReadOptions, Sample, ShardError, UnreadableShardError
from pipeline.read.shards import Shard
from pipeline.read.webdataset import read_tar
from pipeline.storage import ObjectChanged, ObjectInfo, ObjectNotFound, Storage, StorageError, relative_name

_FETCHES = 8  # loose images fetched at once


def read_samples(storage: Storage, shard: Shard, options: ReadOptions) -> Iterator[Sample]:
    """Yields the shard's samples in shard order; a second reading yields the same.

    Streams: it holds one sample of a tar, 16 rows of a Parquet file and their pages, or 16 image files, and
    read buffers of 8 MiB: one, or of a tar in object storage one more than `fetches`.

    **WebDataset.** Adjacent members whose names are equal up to the first dot of the last part form a
    sample, with that as its key; the image is the first whose remaining extension is an image's. A
    member whose extension the sample has already starts another sample of the same key. Members that
    are not adjacent to their image become a sample of their own: an error that names them. The label
    is `.cls` (a class index or name), or a field of `.json`. Folders and hidden members (`._x.jpg`,
    `__MACOSX/`) are skipped.

    **Parquet.** The image column holds binary values, or `struct<bytes, path>` as Hugging Face writes
    them: the column named `image`, else the only one of such a type.

    **Image files.** Keys are the names under the listed folder. There are no labels.

    A label that is null or -1 is none; one that is no class makes the sample an error.

    Raises:
        ShardError: the object is missing, changed, truncated, corrupt, of another format, or lacks a
            named column. Samples yielded before do not count: the shard is not labeled.
    """
    key = None
    count = 0
    try:
        for sample in _READERS[shard.format](storage, shard, options):
            key, count = sample.key, count + 1
            yield sample
    except Exception as error:
        # No bytes of one shard may end the job for all others.
        place = f"after {count} samples (the last was {key!r}): " if count else ""
        is_storage = isinstance(error, StorageError) and not isinstance(error, ObjectNotFound | ObjectChanged)
        raise ShardError(shard.uri, place + _cause(shard, error), transient=is_storage) from error


def _cause(shard: Shard, error: Exception) -> str:
    if isinstance(error, StorageError) and error.uri == shard.uri:
        return error.cause
    if isinstance(error, StorageError | UnreadableShardError):
        return str(error)
    return f"is damaged, or not of the format {shard.format} ({type(error).__name__}: {error})"


def _read_images(storage: Storage, shard: Shard, options: ReadOptions) -> Iterator[Sample]:
    """Yields the samples of a group of image files, in the order of its members."""
    folder = shard.uri.rpartition("/")[0]

    def fetch(info: ObjectInfo) -> Sample:
        key = relative_name(folder, info.uri)
        if error := options.size_error(info.size):
            return Sample(key, None, error=error)
        try:
            return Sample(key, storage.read(info.uri, info.version))
        except ObjectNotFound as failure:
            return Sample(key, None, error=sample_error(ErrorCategory.IMAGE_NOT_FOUND, str(failure)))
        except ObjectChanged as failure:
            return Sample(key, None, error=sample_error(ErrorCategory.IMAGE_CHANGED, str(failure)))

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


_READERS = {"webdataset": read_tar, "parquet": read_parquet, "images": _read_images}
