"""Decompression of tars, in limited memory. Compressed data that is cut off or damaged raises an error."""

import gzip
import io
import lzma
import re
import zlib
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.read.samples import UnreadableShardError

#: The first bytes of each format. pzstd begins with a skippable frame, and a tar with a name such as `BZh`.
_STARTS = re.compile(
    rb"(?P<gzip>\x1f\x8b)|(?P<xz>\xfd7zXZ\x00)|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)|"
    rb"(?P<lz4>\x04\x22\x4d\x18)|(?P<bz2>BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90))"
)
_MAX_XZ_MEMORY = 192 * 1024**2  # bytes; `xz -9` needs 65 MiB. Arrow limits the window of zstd to 128 MiB.
_READ_BYTES, _SKIPPED_BYTES = 64 * 1024, 1024**2


def find_compression(start: bytes) -> str | None:
    """Returns the compression of a file from its first bytes, at least 10; None if it is not compressed."""
    found = _STARTS.match(start)
    return found and found.lastgroup


class DecompressedFile:
    """The decompressed content of all frames or streams of a file; `seek` only moves forward."""

    def __init__(self, file: BinaryIO, compression: str) -> None:
        self._compression, self._position = compression, 0
        if compression == "gzip":  # accepts zeros after the end, unlike Arrow
            self._file: Any = gzip.GzipFile(fileobj=file, mode="rb")
        elif compression == "xz":
            self._file = io.BufferedReader(_XzFile(file), _READ_BYTES)
        else:
            self._file = pa.CompressedInputStream(pa.PythonFile(file, "r"), compression)

    def read(self, size: int) -> bytes:
        """Reads up to `size` bytes, fewer only at the end; raises `UnreadableShardError` for damaged data."""
        try:
            content: bytes = self._file.read(size)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            window = " with a window of at most 128 MiB, as by default" * ("memory" in str(error).lower())
            cause = f"the {self._compression} data is damaged or cut off ({error})"
            raise UnreadableShardError(f"{cause}; compress the tar again{window}") from error
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


class _XzFile(io.RawIOBase):
    """The content of an .xz file. `lzma.LZMAFile` has no limit of memory, and ignores data after a stream."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, _MAX_XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        content = b""
        while not content:
            data = b""
            if self._stream.eof:  # zeros may follow, then another stream
                data = self._stream.unused_data.lstrip(b"\0")
                while not data and (zeros := self._file.read(_READ_BYTES)):
                    data = zeros.lstrip(b"\0")
                if not data:
                    return 0
                self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, _MAX_XZ_MEMORY)
            elif self._stream.needs_input and not (data := self._file.read(_READ_BYTES)):
                raise EOFError("the file ends within a stream")
            content = self._stream.decompress(data, len(buffer))
        cast(memoryview, buffer)[: len(content)] = content
        return len(content)
