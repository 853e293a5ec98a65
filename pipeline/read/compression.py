"""Decompression of tars, in limited memory. Compressed data that is cut off or damaged raises an error."""

import io
import lzma
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from pipeline.read.samples import UnreadableShardError

#: The first bytes of each format. pzstd begins with a skippable frame, and a tar with a name such as `BZh`.
_STARTS = re.compile(
    rb"(?P<gzip>\x1f\x8b)|(?P<xz>\xfd7zXZ\x00)|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)|"
    rb"(?P<lz4>\x04\x22\x4d\x18)|(?P<bz2>BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90))"
)
_MAX_XZ_MEMORY = 192 * 1024**2  # bytes; `xz -9` needs 65 MiB. Arrow limits the window of zstd to 128 MiB.
_SKIPPED_BYTES = 1024**2


def find_compression(start: bytes) -> str | None:
    """Returns the compression of a file from its first bytes, at least 10; None if it is not compressed."""
    found = _STARTS.match(start)
    return found and found.lastgroup


class DecompressedFile:
    """The decompressed content of all frames or streams of a file; `seek` only moves forward.

    `read` and the constructor raise `UnreadableShardError` for damaged data.
    """

    closed = False  # for Arrow

    def __init__(self, file: Any, compression: str) -> None:
        self._compression, self._position = compression, 0
        with self._explained_errors():
            if compression == "xz":  # without a limit, the first block may ask for gigabytes
                lzma.LZMADecompressor(lzma.FORMAT_XZ, _MAX_XZ_MEMORY).decompress(file.peek(1), max_length=1)
                self._file: Any = lzma.LZMAFile(file)  # noqa: SIM115
            else:
                self._file = pa.CompressedInputStream(pa.PythonFile(file, "r"), compression)

    @contextmanager
    def _explained_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, lzma.LZMAError) as error:
            window = " with a window of at most 128 MiB, as by default" * ("memory" in str(error).lower())
            cause = f"the {self._compression} data is damaged or cut off ({error})"
            raise UnreadableShardError(f"{cause}; compress the tar again{window}") from error

    def read(self, size: int) -> bytes:
        """Reads up to `size` bytes, fewer only at the end."""
        with self._explained_errors():
            content: bytes = self._file.read(size)
        self._position += len(content)
        return content

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Skips to a position, at most to the end, or to the end; returns the new position."""
        stop = position if whence == io.SEEK_SET else float("inf")
        while self._position < stop and self.read(int(min(_SKIPPED_BYTES, stop - self._position))):
            pass
        return self._position

    def tell(self) -> int:
        """Returns the position."""
        return self._position
