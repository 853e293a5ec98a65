"""Finds the pixels of usual PNGs and JPEGs, without Pillow's readers of metadata.

For a small image, the readers take most of the time. The decoders of the pixels are Pillow's.
"""

import re
import struct
import zlib
from typing import Any

from pipeline.decode.repair import START_OF_SCAN

#: A PNG with 8 bits per sample, without metadata, and with its pixels in one chunk.
_PNG = re.compile(
    rb"\x89PNG\r\n\x1a\n\0\0\0\r(IHDR.{8}\x08[\0\2\4\6]\0\0\0)(.{4})(.{4})IDAT(.*).{4}\0\0\0\0IEND\xaeB`\x82",
    re.DOTALL,
)
_PNG_MODES = {0: "L", 2: "RGB", 4: "LA", 6: "RGBA"}
#: The start of a JPEG with an APP0 segment of JFIF, which has 18 bytes.
_JFIF = b"\xff\xd8\xff\xe0\0\x10JFIF\0"
#: The other segments of a baseline JPEG without metadata: SOF0, DQT, DHT, DRI.
_JPEG_FRAME = b"\xff\xc0"
_JPEG_SEGMENTS = _JPEG_FRAME, b"\xff\xdb", b"\xff\xc4", b"\xff\xdd"
_JPEG_MODES = {(8, 1): "L", (8, 3): "RGB"}


def parse_png(data: bytes) -> tuple[Any, ...] | None:
    """Returns the arguments of `Image.frombytes` for a usual PNG, or None."""
    if (found := _PNG.fullmatch(data)) is None:
        return None
    header, checksum, length, pixels = found.groups()
    if zlib.crc32(header) != int.from_bytes(checksum) or len(pixels) != int.from_bytes(length):
        return None
    width, height, _, color = struct.unpack(">IIBB", header[4:14])
    mode = _PNG_MODES[color]
    return mode, (width, height), pixels, "zip", (mode,)


def parse_jpeg(data: bytes) -> tuple[Any, ...] | None:
    """Returns the same for a usual JPEG, or None; raises any exception if the JPEG is damaged."""
    position, frame = 20 if data.startswith(_JFIF) else 2, b""
    while (segment := data[position : position + 2]) in _JPEG_SEGMENTS:
        length = int.from_bytes(data[position + 2 : position + 4])
        frame = data[position + 4 : position + 10] if segment == _JPEG_FRAME else frame
        position += 2 + length
    if segment != START_OF_SCAN:
        return None
    bits, height, width, components = struct.unpack(">BHHB", frame)
    mode = _JPEG_MODES[bits, components]
    return mode, (width, height), data, "jpeg", (mode, "")
