"""Limits what an encoded image can cost: CPU time, and memory that does not follow from its size in pixels.

Decoders need memory in proportion to the pixels (`BYTES_PER_PIXEL`) and to the bytes of the file. This module
finds exceptions to this rule before a decoder starts.
"""

import io
import re
import struct
import time
from collections.abc import Iterator
from typing import TypeVar

from PIL.ImageFile import ImageFile

from pipeline.read.limits import Deadline, TimedFile

#: Maximum memory of a decoder and of the conversion to RGB, in bytes per pixel of the image: 17 for WebP, at
#: most 13 for the other formats. `tests/pipeline/test_hostile_inputs.py` measures them.
BYTES_PER_PIXEL = 18

#: Default of the maximum CPU time of an image in seconds.
TIMEOUT_S = 60.0

#: Maximum number of segments of a JPEG, of chunks of a PNG, and of values in the fields of a TIFF. Pillow
#: needs up to 500 bytes for each.
MAX_PARTS = 1 << 18
#: Files of this size are too small for a large number of parts.
_SMALL_FILE = 1 << 20
#: Maximum size of EXIF data whose orientation is read.
MAX_EXIF_BYTES = 4 << 20

#: Maximum work for a block of a JPEG with several scans: bytes of the block times pixels of the image. A scan
#: processes all pixels, and can have few bytes. The deadline is checked before each block.
_MAX_BLOCK_WORK = 1 << 36

_JPEG_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xda-\xfe]")
#: Frames with Huffman codes: baseline, extended and progressive.
HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)  # tables, and an extension
_START_OF_SCAN = 0xDA

# Tags of a TIFF: width and length of the image and of its tiles, and the directories in the first directory.
_TIFF_SIZES = (256, 257, 322, 323)
_DIRECTORIES = (34665, 34853, 40965)
# Types of fields: Pillow keeps the values of some as bytes; others are integers.
_BYTE_TYPES = (1, 2, 6, 7)
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "B", 8: "H", 9: "I", 13: "I", 16: "Q", 17: "Q", 18: "Q"}

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


def open_image(name: str, reader: type[_File], data: bytes, deadline: DecodeDeadline) -> _File:
    """Opens an image; raises `ValueError` if it has too many parts, and whatever Pillow raises."""
    _check_parts(name, data)
    file = reader(TimedFile(io.BytesIO(data), deadline))
    if name == "JPEG" and (block := _jpeg_block_bytes(data, file.width * file.height)):
        file.decodermaxblock = block
    return file


def jpeg_frame(data: bytes) -> tuple[int, bool] | None:
    """Returns the marker of a JPEG's frame, and whether the first scan has all components.

    Returns None unless one frame and no gaps precede the first scan.
    """
    frame, components, position = None, 0, 2
    while position + 4 < len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _START_OF_SCAN:
            return None if frame is None else (frame, data[position + 4] == components)
        if 0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES:
            if frame is not None:
                return None
            frame, components = marker, data[position + 9] if position + 9 < len(data) else 0
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def _jpeg_block_bytes(data: bytes, pixels: int) -> int | None:
    """Returns the size of the blocks in which to read a JPEG; None for the default."""
    frame = jpeg_frame(data)
    if frame in ((0xC0, True), (0xC1, True)) or (frame and frame[0] not in HUFFMAN_FRAMES):
        return None  # one scan; or arithmetic codes, which libjpeg reads in one block only
    return max(512, _MAX_BLOCK_WORK // pixels)


def _check_parts(name: str, data: bytes) -> None:
    """Raises `ValueError` for a file whose parts need much more memory than its bytes and pixels."""
    parts = 0
    if len(data) <= _SMALL_FILE:
        return
    if name == "JPEG":
        parts = sum(1 for _ in _JPEG_SEGMENT.finditer(data))
    elif name == "TIFF":
        parts = sum(count for _, kind, count, _ in _tiff_fields(data) if kind not in _BYTE_TYPES)
    if parts > MAX_PARTS:
        raise ValueError(f"more than {MAX_PARTS} segments, strips, tiles or other values")


def tiled_size(data: bytes) -> tuple[int, int]:
    """Returns width and height in pixels of the tiles of a TIFF together; zeros if it has no tiles."""
    sizes = dict.fromkeys(_TIFF_SIZES, 0)
    for tag, _, _, value in _tiff_fields(data):
        if tag in sizes and value is not None:
            sizes[tag] = max(sizes[tag], value)
    width, height, tile_width, tile_height = sizes.values()
    if not (tile_width and tile_height):
        return 0, 0
    return -(-width // tile_width) * tile_width, -(-height // tile_height) * tile_height


def _tiff_fields(data: bytes) -> Iterator[tuple[int, int, int, int | None]]:
    """Yields the fields of the first directory and of those in it: tag, type, count, and a single integer."""
    order, is_big = "<" if data[:1] == b"I" else ">", 43 in data[2:4]
    address, number, field = (
        f"{order}{kind}" for kind in (("Q", "Q", "HHQ8x") if is_big else ("I", "H", "HHI4x"))
    )
    size, value_at = struct.calcsize(field), struct.calcsize(field[:-2])
    try:
        directories = [struct.unpack_from(address, data, 8 if is_big else 4)[0]]
        for start in directories:
            (fields,) = struct.unpack_from(number, data, start)
            first = start + struct.calcsize(number)
            for position in range(first, first + size * fields, size):
                tag, kind, count = struct.unpack_from(field, data, position)
                value = None
                if count == 1 and kind in _INTEGERS:
                    (value,) = struct.unpack_from(order + _INTEGERS[kind], data, position + value_at)
                    if tag in _DIRECTORIES and len(directories) <= len(_DIRECTORIES):
                        directories.append(value)
                yield tag, kind, count, value
    except struct.error:  # the file ends before the directory
        return
