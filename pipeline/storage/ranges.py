"""Objects as seekable streams over ranged reads, on demand or ahead."""

# ruff: noqa: D102 - io.RawIOBase describes the methods

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipeline.storage.objects import ObjectInfo, StorageError

CHUNK_BYTES = 8 * 1024**2  # one ranged GET; what an open object holds in memory


class RangeReader(io.RawIOBase):
    """A seekable stream over `fetch(start, stop)`, which returns those bytes of one version."""

    def __init__(
        self, info: ObjectInfo, fetch: Callable[[int, int], bytes], close: Callable[[], None] | None = None
    ) -> None:
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
        """Fills the buffer up to the end of the object, never less (pyarrow relies on it)."""
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._info.size - self._position))
        for done in range(0, wanted, CHUNK_BYTES):
            count = min(CHUNK_BYTES, wanted - done)
            start = self._position + done
            view[done : done + count] = self._fetched(start, start + count)
        self._position += wanted
        return wanted

    def _fetched(self, start: int, stop: int) -> bytes:
        data = self._fetch(start, stop)
        if len(data) != stop - start:
            cause = f"{len(data)} bytes at offset {start} where {stop - start} should be"
            raise StorageError(self._info.uri, cause)
        return data

    def readall(self) -> bytes:
        data = bytearray(max(0, self._info.size - self._position))
        self.readinto(data)
        return bytes(data)

    def ahead(self, at_once: int) -> ReadAhead:
        """Returns a stream over the same object that fetches ahead."""
        return ReadAhead(self._info, self._fetch, at_once)

    def close(self) -> None:
        if not self.closed and self._close is not None:
            self._close()
        super().close()


class ReadAhead(RangeReader):
    """Fetches the next blocks while its reader works on the current one.

    Holds up to `at_once` blocks of 8 MiB besides the current one. For reading forwards: after a jump to
    where nothing was fetched, it starts again there.
    """

    def __init__(self, info: ObjectInfo, fetch: Callable[[int, int], bytes], at_once: int) -> None:
        super().__init__(info, fetch)
        self._at_once = at_once
        self._blocks: dict[int, Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="read-ahead")

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and self._position < self._info.size:
            number, offset = divmod(self._position, CHUNK_BYTES)
            data = memoryview(self._block(number))[offset : offset + len(view) - done]
            view[done : done + len(data)] = data
            done += len(data)
            self._position += len(data)
        return done

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _block(self, number: int) -> bytes:
        """Returns a block's bytes, and starts fetching the next ones."""
        last = (self._info.size - 1) // CHUNK_BYTES
        wanted = range(number, min(number + self._at_once, last) + 1)
        for other in self._blocks.keys() - set(wanted):
            self._blocks.pop(other).cancel()
        for other in wanted:
            if other not in self._blocks:
                start = other * CHUNK_BYTES
                stop = min(start + CHUNK_BYTES, self._info.size)
                self._blocks[other] = self._pool.submit(self._fetched, start, stop)
        return self._blocks[number].result()
