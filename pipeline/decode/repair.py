"""Repairs files with sound pixels: PNGs with metadata that Pillow refuses, JPEGs without their last bytes."""

import hashlib

from PIL.JpegImagePlugin import JpegImageFile

from pipeline.decode.bounds import DecodeDeadline, open_image

START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"

#: Chunks of a PNG that affect the first frame: its pixels, and its orientation in EXIF data.
_USED_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf")
#: Texts of a PNG that may contain the orientation.
ORIENTATION_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")

#: Bytes that a decoder reads as pixels wherever a JPEG lacks data, also after a restart marker, and skips
#: wherever the data is complete.
_FILLER = b"".join(bytes([0xFF, marker, *range(0xFE, 0, -1)]) for marker in range(0xD0, 0xD8))[2:]


def remove_metadata(data: bytes, kept_texts: tuple[bytes, ...] = ()) -> bytes:
    """Returns a PNG without the chunks that do not affect its first frame, except for some texts."""
    view, position = memoryview(data), 8
    kept = [view[:position]]
    while position + 8 <= len(data):
        kind = data[position + 4 : position + 8]
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        is_text = kind in (b"tEXt", b"zTXt", b"iTXt")
        if kind in _USED_CHUNKS or (is_text and data.startswith(kept_texts, position + 8)):
            kept.append(view[position:end])
        position = end
    return b"".join(kept)


def add_end(data: bytes, deadline: DecodeDeadline) -> bytes:
    """Returns a JPEG with the marker of its end, if nothing but this marker is missing; else the same JPEG.

    Decodes twice, without and with bytes in the place of missing data. The results differ if a pixel lacks
    data.
    """
    start, digests = data.rstrip(b"\xff"), set()
    try:
        for tail in (END_OF_IMAGE, _FILLER + END_OF_IMAGE):
            file = open_image(JpegImageFile, start + tail, deadline)
            if "progressive" in file.info or start[start.rindex(START_OF_SCAN) + 4] != file.layers:
                return data  # further scans may be missing
            digests.add(hashlib.sha256(file.tobytes()).digest())
    except Exception:  # it has another fault
        return data
    return start + END_OF_IMAGE if len(digests) == 1 else data
