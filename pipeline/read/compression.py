"""Decompression of tars, in limited memory. Compressed data that is cut off or damaged raises an error."""

import io
import lzma
import re
from typing import Any

import pyarrow as pa

from pipeline.read.samples import UnreadableShardError

#: The first bytes of each format. pzstd begins with a skippable frame, and a tar with a name such as `BZh`.
_STARTS = re.compile(
    rb"(?P<gzip>\x1f\x8b)|(?P<xz>\xfd7zXZ\x00)|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)|"
    rb"(?P<lz4>\x04\x22\x4d\x18)|(?P<bz2>BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90))"
)
_MAX_XZ_MEMORY = 192 * 1024**2  # bytes; `xz -9` needs 65 MiB. Arrow limits the window of zstd to 128 MiB.
_BLOCK_BYTES = 1024**2


def find_compression(start: bytes) -> str | None:
    """Returns the compression of a file from its first bytes, at least 10; None if it is not compressed."""
    found = _STARTS.match(start)
    return found and found.lastgroup


class DecompressedFile:
    """The decompressed content of all frames or streams of a file; `seek` only moves forward."""

    closed = False  # for Arrow

    def __init__(self, file: Any, compression: str) -> None:
        self._compression, self._position = compression, 0
        if compression == "xz":
            self._file: Any = io.BufferedReader(_XzContent(file))
        else:
            self._file = pa.CompressedInputStream(pa.PythonFile(file, "r"), compression)

    def read(self, size: int) -> bytes:
        """Reads up to `size` bytes, fewer only at the end; raises `UnreadableShardError` for damaged data."""
        try:
            content: bytes = self._file.read(size)
        except (OSError, EOFError, lzma.LZMAError) as error:
            remedy = "compress the tar again"
            if "memory" in str(error).lower():
                remedy += " with a window of at most 128 MiB, as by default"
            cause = f"the {self._compression} data is damaged or cut off ({error})"
            raise UnreadableShardError(f"{cause}; {remedy}") from error
        self._position += len(content)
        return content

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Skips to a position, at most to the end, or to the end; returns the new position."""
        stop = position if whence == io.SEEK_SET else float("inf")
        while self._position < stop and self.read(int(min(_BLOCK_BYTES, stop - self._position))):
            pass
        return self._position

    def tell(self) -> int:
        """Returns the position."""
        return self._position


class _XzContent(io.RawIOBase):
    """The content of all streams of an xz file. `lzma.LZMAFile` does not limit the memory of a stream."""

    def __init__(self, file: Any) -> None:
        self._file, self._stream = file, _xz_stream()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        content = b""
        while not content:
            data = b""
            if self._stream.eof:
                data = self._stream.unused_data.lstrip(b"\0") or self._file.read(_BLOCK_BYTES).lstrip(b"\0")
                if not data:
                    return 0
                self._stream = _xz_stream()
            elif self._stream.needs_input:
                data = self._file.read(_BLOCK_BYTES)
                if not data:
                    raise EOFError("the end is missing")
            content = self._stream.decompress(data, len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _xz_stream() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, _MAX_XZ_MEMORY)
