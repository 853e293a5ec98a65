"""Limits what an encoded image can cost: CPU time, and memory beyond that for its pixels."""

import io
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from pipeline.read.limits import Deadline, TimedFile

#: Maximum memory of a decoder and of the conversion to RGB, in bytes per pixel of the image: 17 for WebP, at
#: most 13 for the other formats. `tests/pipeline/test_hostile_inputs.py` measures them.
BYTES_PER_PIXEL = 18

#: Default of the maximum CPU time of an image in seconds.
TIMEOUT_S = 60.0

#: Maximum number of segments of a JPEG, and of values in the fields of a TIFF: Pillow needs up to 500 bytes
#: for each.
MAX_PARTS = 1 << 18
#: Maximum size of EXIF data whose orientation is read.
MAX_EXIF_BYTES = 4 << 20

#: Maximum work for a block of a JPEG: bytes of the block times pixels of the image. A scan processes all
#: pixels, and can have few bytes. The deadline is checked before each block.
MAX_BLOCK_WORK = 1 << 36

_JPEG_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xda-\xfe]")

# Fields of a TIFF: width and length of a tile, and the directories in the first directory.
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_DIRECTORIES = (34665, 34853, 40965)
# Types whose values Pillow keeps as bytes, and types of integers that are shorter than an address.
_BYTE_TYPES = (1, 2, 6, 7)
_INTEGER_BYTES = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 13: 4}

_File = TypeVar("_File", bound=ImageFile)


class DecodeDeadline(Deadline):
    """Limits the CPU time of the calling thread: a loaded or suspended machine does not cause errors."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.message = f"decoding took more than {seconds:g} s (decode.timeout_s)"
        self._cpu_end = time.thread_time() + seconds

    @property
    def is_over(self) -> bool:
        """Whether the time is used up."""
        # The clock is checked first: it is faster to read, and CPU time never exceeds it.
        return time.monotonic() > self._end and time.thread_time() > self._cpu_end

    def check(self) -> None:
        """Raises `TimeoutError` after the time limit."""
        if self.is_over:
            raise TimeoutError(self.message)


def open_image(reader: Callable[[Any], _File], data: bytes, deadline: DecodeDeadline) -> _File:
    """Opens an image; raises `ValueError` if a JPEG has too many segments, and whatever Pillow raises."""
    is_jpeg = reader is JpegImageFile
    if is_jpeg and len(data) > 4 * MAX_PARTS:  # a segment has at least 4 bytes
        _check_parts(sum(1 for _ in _JPEG_SEGMENT.finditer(data)))
    file = reader(TimedFile(io.BytesIO(data), deadline))
    if is_jpeg:
        file.decodermaxblock = max(512, MAX_BLOCK_WORK // (file.width * file.height))
    return file


def _check_parts(parts: int) -> None:
    if parts > MAX_PARTS:
        raise ValueError(f"more than {MAX_PARTS} segments, strips, tiles or other values")


def read_tile_size(data: bytes) -> tuple[int, int]:
    """Returns width and length of the tiles of a TIFF, or zeros; raises `ValueError` for too many values."""
    sizes, parts = {_TILE_WIDTH: 0, _TILE_LENGTH: 0}, 0
    for tag, kind, count, value in _tiff_fields(data):
        # Pillow skips values that would exceed the file.
        parts += 1 if kind in _BYTE_TYPES or count > len(data) else max(1, count)
        _check_parts(parts)
        if tag in sizes:
            sizes[tag] = max(sizes[tag], value)
    return sizes[_TILE_WIDTH], sizes[_TILE_LENGTH]


def _tiff_fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yields the fields of the first directory and of those in it: tag, type, count, and value or address."""
    # BigTIFF has longer addresses and counts. Beyond the end of the file, numbers are 0.
    width, counter, size = (8, 8, 20) if 43 in data[2:4] else (4, 2, 12)

    def number(position: int, length: int) -> int:
        return int.from_bytes(data[position : position + length], "little" if data[:1] == b"I" else "big")

    directories = [number(width, width)]
    for start in directories:
        fields = min(number(start, counter), len(data) // size)
        for position in range(start + counter, start + counter + size * fields, size):
            tag, kind, count = number(position, 2), number(position + 2, 2), number(position + 4, width)
            value = number(position + 4 + width, _INTEGER_BYTES.get(kind, width))
            if tag in _DIRECTORIES and len(directories) <= len(_DIRECTORIES):
                directories.append(value)
            yield tag, kind, count, value
