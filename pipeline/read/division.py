"""Divides large Parquet files and uncompressed tars into parts, each a shard of its own."""

import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import compress, islice, pairwise
from typing import BinaryIO

import pyarrow.parquet as pq

from pipeline.config import ConfigError
from pipeline.read.limits import Deadline
from pipeline.read.parquet_pages import FooterFile
from pipeline.read.samples import UnreadableShardError
from pipeline.read.shards import Shard
from pipeline.read.tar import BLOCK_BYTES, read_members
from pipeline.read.webdataset import is_ignored, split_name
from pipeline.storage import ObjectChanged, ObjectNotFound, Storage, StorageError

_THREADS, _BATCH_FILES = 16, 256
_PROBED_BYTES, _PROBE_BYTES = 1024**2, 64 * 1024  # at a boundary in a tar, and of one request
_MAX_PARTS = 10_000  # of a tar, each of which is found by a request
_MAX_MEMBERS = 100  # that are read to find the start of a sample
_NO_LIMIT = Deadline(math.inf)  # requests have their own

#: The kind of position in a part's URI, by format.
_KINDS = {"parquet": "rows", "webdataset": "bytes"}
_PART, _SPAN = re.compile(r"/(rows|bytes)-\d{12}$"), re.compile(r"/(\d+)-(\d+)(/|$)")


def whole_file(uri: str) -> str:
    """Returns the URI of the file that a shard is a part of, or the shard's URI."""
    return _PART.sub("", uri)


def overlap(part: Shard, uri: str, version: str) -> bool:
    """Returns whether a part of a file and a shard, whole or part, have a row of the file in common."""
    if part.span is None or part.object.uri != whole_file(uri):
        return False
    found = _SPAN.search(version)
    return found is None or (int(found[1]) < part.span[1] and part.span[0] < int(found[2]))


def divide_files(
    storage: Storage,
    shards: Iterator[Shard],
    split_bytes: int | None = None,
    carry: Mapping[str, str | None] | None = None,
    key: str = "first-dot",
) -> Iterator[Shard]:
    """Yields the shards, or the parts of files of more than `split_bytes`, in order.

    The columns of `input.carry` become part of the versions. `key` is the rule for keys of tars. Raises
    `StorageError`, or `ConfigError` for a tar of more than 10,000 parts.
    """
    names = json.dumps([*(carry or {}).items()]).encode()
    suffix = f"/carry-{hashlib.blake2b(names, digest_size=8).hexdigest()}" if carry else ""
    limit = split_bytes or sys.maxsize
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="divide") as pool:
        size = 1  # a check for any shard stops at the first one
        while batch := list(islice(shards, size)):
            is_large = [shard.size > limit and shard.format in _KINDS for shard in batch]
            # `map` cancels the rest of the batch after an error.
            divided = list(pool.map(partial(_divide, storage, limit, key), compress(batch, is_large)))
            parts = iter(divided)
            for shard, is_divided in zip(batch, is_large, strict=True):
                for part in next(parts) if is_divided else [shard]:
                    yield _with_suffix(part, suffix) if suffix else part
            size = _BATCH_FILES


def _divide(storage: Storage, part_bytes: int, key: str, shard: Shard) -> list[Shard]:
    """Returns the parts of a file; the file itself if it has one part, or its reader will fail."""
    try:
        with storage.open_unbuffered(shard.object.uri, shard.object.version) as stream:
            if shard.format == "parquet":
                starts = _parquet_starts(stream, shard.size, part_bytes)
            else:
                starts = _tar_starts(stream, shard, part_bytes, key)
    except (ObjectChanged, ObjectNotFound):
        return [shard]
    except (ConfigError, StorageError, MemoryError):  # another division would label the file again
        raise
    except Exception:
        return [shard]
    if len(starts) < 3:
        return [shard]
    return [
        Shard(
            f"{shard.uri}/{_KINDS[shard.format]}-{start:012d}",
            f"{shard.version}/{start}-{stop}",
            shard.format,
            stop_byte - start_byte,
            span=(start, stop),
            file=shard.object,
        )
        for (start, start_byte), (stop, stop_byte) in pairwise(starts)
    ]


def _with_suffix(shard: Shard, suffix: str) -> Shard:
    """Returns a shard with a longer version, if its rows may have the columns of `input.carry`."""
    if shard.format == "images":
        return shard
    file = shard.object if shard.format in _KINDS else shard.file
    return replace(shard, version=f"{shard.version}{suffix}", file=file)


def _parquet_starts(stream: io.RawIOBase, file_bytes: int, part_bytes: int) -> list[tuple[int, int]]:
    """Returns the first row of each part, with its position in bytes, and the ends of the file."""
    footer = pq.ParquetFile(FooterFile(stream, _NO_LIMIT), pre_buffer=False).metadata
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    total = sum(group.total_byte_size for group in groups)
    count = -(-file_bytes // part_bytes)
    starts, row, size = list[tuple[int, int]](), 0, 0
    for group in groups:
        if group.num_rows and size * count >= total * len(starts):
            starts.append((row, size * file_bytes // total))
        row, size = row + group.num_rows, size + group.total_byte_size
    return [*starts, (row, file_bytes)]


def _tar_starts(stream: io.RawIOBase, shard: Shard, part_bytes: int, rule: str) -> list[tuple[int, int]]:
    """Returns the first byte of each part, twice, and the end of the file; raises for compressed tars."""
    starts, buffered = [0], io.BufferedReader(stream, _PROBE_BYTES)
    next(read_members(buffered))  # raises for compressed tars and other files
    if shard.size > _MAX_PARTS * part_bytes:
        raise ConfigError(
            f"read.split_bytes: {part_bytes} divides {shard.uri} into more than {_MAX_PARTS:,} parts; "
            f"set at least {-(-shard.size // _MAX_PARTS)}"
        )
    for boundary in range(part_bytes, shard.size, part_bytes):
        start = _find_sample(buffered, boundary // BLOCK_BYTES * BLOCK_BYTES, rule)
        if start is not None and start > starts[-1]:
            starts.append(start)
    return [(start, start) for start in [*starts, shard.size]]


def _find_sample(stream: BinaryIO, boundary: int, rule: str) -> int | None:
    """Returns where a sample starts after a boundary; None if no header is near.

    The first header that is found may lack the extended headers before it, so its name does not count.
    """
    for position in range(boundary, boundary + _PROBED_BYTES, BLOCK_BYTES):
        stream.seek(position)
        if not any(stream.read(BLOCK_BYTES)):
            continue
        before: str | None = None
        try:
            members = islice(read_members(stream, position), 1, _MAX_MEMBERS)
            for member in members:
                key = None if is_ignored(member) else split_name(member.name, rule)[0]
                if key is not None and before not in (None, key):
                    return member.offset
                before = key or before
        except UnreadableShardError:
            continue
        return None
    return None
