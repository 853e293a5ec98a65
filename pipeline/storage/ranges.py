"""Seekable streams over ranged reads of objects, with optional read-ahead."""

# ruff: noqa: D102 - io.RawIOBase describes the methods

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipeline.storage.objects import ObjectInfo

CHUNK_BYTES = 8 * 1024**2  # size of one ranged GET, and of an open object's buffer

#: Returns the bytes from `start` to `stop` of one version of an object.
Fetch = Callable[[int, int], bytes]


class RangeReader(io.RawIOBase):
    """A seekable stream over ranged reads of one version of an object."""

    def __init__(self, info: ObjectInfo, fetch: Fetch, close: Callable[[], None] | None = None) -> None:
        self._info = info
        self._fetch = fetch
        self._close = close
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._info.size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fills the buffer, except at the end of the object; pyarrow relies on full reads."""
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._info.size - self._position))
        for done in range(0, wanted, CHUNK_BYTES):
            count = min(CHUNK_BYTES, wanted - done)
            start = self._position + done
            view[done : done + count] = self._fetch(start, start + count)
        self._position += wanted
        return wanted

    def readall(self) -> bytes:
        data = bytearray(max(0, self._info.size - self._position))
        self.readinto(data)
        return bytes(data)

    def with_read_ahead(self, count: int) -> RangeReader:
        """Returns a stream over the same object that fetches the next `count` ranges."""
        blocks = _ReadAhead(self._info.size, self._fetch, count)
        return RangeReader(self._info, blocks.fetch, blocks.close)

    def close(self) -> None:
        if not self.closed and self._close is not None:
            self._close()
        super().close()


class _ReadAhead:
    """Fetches the next `count` blocks of 8 MiB while the reader processes the current block.

    After a seek to another block, read-ahead restarts at this block.
    """

    def __init__(self, size: int, fetch: Fetch, count: int) -> None:
        self._size, self._fetch, self._count = size, fetch, count
        self._blocks: dict[int, Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="read-ahead")

    def fetch(self, start: int, stop: int) -> bytes:
        number, offset = divmod(start, CHUNK_BYTES)
        data = self._block(number)[offset : offset + stop - start]
        start += len(data)
        return data if start == stop else data + self.fetch(start, stop)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _block(self, number: int) -> bytes:
        """Returns a block's bytes, and starts to fetch the next blocks."""
        last = (self._size - 1) // CHUNK_BYTES
        wanted = range(number, min(number + self._count, last) + 1)
        self._blocks = {other: self._blocks.get(other) or self._submit(other) for other in wanted}
        return self._blocks[number].result()

    def _submit(self, number: int) -> Future[bytes]:
        start = number * CHUNK_BYTES
        return self._pool.submit(self._fetch, start, min(start + CHUNK_BYTES, self._size))
