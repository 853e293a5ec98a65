"""Repairs files with sound pixels: PNGs with metadata that Pillow refuses, JPEGs without their last bytes."""

import hashlib
from collections.abc import Callable

from PIL.ImageFile import ImageFile

from pipeline.decode.bounds import MAX_PARTS, jpeg_frame

END_OF_IMAGE = b"\xff\xd9"

#: Ancillary chunks of a PNG that affect pixels: transparency and orientation.
_USED_CHUNKS = (b"tRNS", b"eXIf")
#: XMP data that is not compressed may contain the orientation.
_PLAIN_XMP = b"XML:com.adobe.xmp\0\0"

#: Bytes that a decoder reads as pixels wherever a JPEG lacks data, also after a restart marker, and skips
#: wherever the data is complete.
_FILLER = b"".join(bytes([0xFF, marker, *range(0xFE, 0, -1)]) for marker in range(0xD0, 0xD8))[2:]


def remove_metadata(data: bytes) -> bytes:
    """Returns a PNG without the chunks that do not affect its pixels."""
    view, kept, position = memoryview(data), bytearray(data[:8]), 8
    while position + 8 <= len(data):
        kind = data[position + 4 : position + 8]
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        is_xmp = kind == b"iTXt" and data.startswith(_PLAIN_XMP, position + 8)
        if not kind[0] & 0x20 or kind in _USED_CHUNKS or is_xmp:
            kept += view[position:end]
        position = end
    return bytes(kept)


def has_many_chunks(data: bytes) -> bool:
    """Returns whether a PNG has so many chunks that Pillow needs much memory for metadata."""
    position, count = 8, 0
    if len(data) <= MAX_PARTS * 12:  # a chunk has at least 12 bytes
        return False
    while position + 8 <= len(data) and count <= MAX_PARTS:
        count += 1
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return count > MAX_PARTS


def add_end(data: bytes, read: Callable[[bytes], ImageFile]) -> bytes:
    """Returns a JPEG with the marker of its end, if nothing but this marker is missing; else the same JPEG.

    Decodes twice, without and with bytes in the place of missing data. The results differ if a pixel lacks
    data.

    Args:
        data: the JPEG.
        read: opens the image.
    """
    if jpeg_frame(data) not in ((0xC0, True), (0xC1, True)):
        return data  # further scans may be missing
    start, digests = data.rstrip(b"\xff"), set()
    for tail in (END_OF_IMAGE, _FILLER + END_OF_IMAGE):
        try:
            digests.add(hashlib.sha256(read(start + tail).tobytes()).digest())
        except Exception:  # it has another fault
            return data
    return start + END_OF_IMAGE if len(digests) == 1 else data
