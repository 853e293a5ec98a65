"""Finds the pixels of usual PNGs and JPEGs, without Pillow's readers of metadata.

Of a small image, the readers take most of the time. The decoders of the pixels are Pillow's.
"""

import re
import struct
import zlib

from pipeline.decode.repair import START_OF_SCAN

#: Arguments of `Image.frombytes`: mode, size, encoded pixels, name of the decoder, its arguments.
FrameArguments = tuple[str, tuple[int, int], bytes, str, tuple[str, ...]]

#: A PNG with 8 bits per sample, without metadata, and with its pixels in one chunk.
_PNG = re.compile(
    rb"\x89PNG\r\n\x1a\n\0\0\0\r(IHDR.{8}\x08[\0\2\4\6]\0\0\0)(.{4})(.{4})IDAT(.*).{4}\0\0\0\0IEND\xaeB`\x82",
    re.DOTALL,
)
_PNG_MODES = {0: "L", 2: "RGB", 4: "LA", 6: "RGBA"}
#: The segments of a baseline JPEG without metadata: SOF0, APP0, DQT, DHT, DRI.
_JPEG_FRAME = b"\xff\xc0"
_JPEG_SEGMENTS = _JPEG_FRAME, b"\xff\xe0", b"\xff\xdb", b"\xff\xc4", b"\xff\xdd"
_JPEG_MODES = {1: "L", 3: "RGB"}
_MAX_HEADER_BYTES = 1 << 16  # of a JPEG


def parse_png(data: bytes) -> FrameArguments | None:
    """Returns the frame of a usual PNG, or None."""
    if (found := _PNG.fullmatch(data)) is None:
        return None
    header, checksum, length, pixels = found.groups()
    if zlib.crc32(header) != int.from_bytes(checksum) or len(pixels) != int.from_bytes(length):
        return None
    width, height, _, color = struct.unpack(">IIBB", header[4:14])
    mode = _PNG_MODES[color]
    return mode, (width, height), pixels, "zip", (mode,)


def parse_jpeg(data: bytes) -> FrameArguments | None:
    """Returns the frame of a usual JPEG, or None; raises any exception if the JPEG is damaged."""
    position, frame = 2, b""
    while (segment := data[position : position + 2]) in _JPEG_SEGMENTS and position < _MAX_HEADER_BYTES:
        length = int.from_bytes(data[position + 2 : position + 4])
        frame = data[position + 4 : position + 10] if segment == _JPEG_FRAME else frame
        position += 2 + length
    if segment != START_OF_SCAN:
        return None
    bits, height, width, components = struct.unpack(">BHHB", frame)
    if bits != 8:
        return None
    mode = _JPEG_MODES[components]
    return mode, (width, height), data, "jpeg", (mode, "")
