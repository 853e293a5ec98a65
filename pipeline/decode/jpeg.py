"""JPEGs that every decoder reads alike, found by their headers: those that a GPU may decode."""

import io
from dataclasses import dataclass

from PIL.JpegImagePlugin import JpegImageFile

from pipeline.decode.cpu import Turn, too_large, turn_of

# Longer images are left to the CPU too: here, all of an image is resized, though the crop keeps little.
MAX_ASPECT_RATIO = 16

# Of a frame: baseline, extended and progressive, with Huffman codes. Further markers up to 0xCF, but for
# three, are of frames too: lossless, hierarchical, or with arithmetic coding.
HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
START_OF_SCAN = 0xDA
END_OF_IMAGE = b"\xff\xd9"

# Horizontal and vertical sampling of luminance, where that of color is 1 x 1: 4:4:4 to 4:1:1.
SAMPLINGS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))


@dataclass(frozen=True, slots=True)
class PlainJpeg:
    """A JPEG that any decoder reads alike, as far as its headers tell.

    Attributes:
        row: the JPEG's place in the chunk.
        width, height: in pixels, as stored.
    """

    row: int
    data: bytes
    width: int
    height: int
    turn: Turn | None


def plain_jpeg(row: int, data: bytes, max_pixels: int) -> PlainJpeg | None:
    """The JPEG, if nothing in its headers is unusual, and it is complete; else None.

    Unusual is what decoders may take differently, or not at all: other colors than gray and YCbCr, other
    codes than Huffman's, odd sampling, a very large or long image.
    """
    if not data.endswith(END_OF_IMAGE) or _frame(data) not in HUFFMAN_FRAMES:
        return None
    try:
        file = JpegImageFile(io.BytesIO(data))
        width, height = file.size
        components = [part[0] for part in file.layer]
        samplings = [part[1:3] for part in file.layer]
    except Exception:  # whatever it is, the CPU decoder runs into it too
        return None
    gray = samplings == [(1, 1)]
    # Adobe's marker, and other numbers of the components, may say that it is RGB.
    color = components == [1, 2, 3] and file.info.get("adobe_transform", 1) == 1
    color = color and samplings[0] in SAMPLINGS and samplings[1:] == [(1, 1)] * 2
    if not (gray or color) or too_large(width, height, max_pixels):
        return None
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        return None
    return PlainJpeg(row, data, width, height, turn_of(file))


def _frame(data: bytes) -> int | None:
    """The marker of a JPEG's only frame; None if there are others before the first scan, or gaps."""
    frame, at = None, 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == START_OF_SCAN:
            return frame
        # Between these there are Huffman tables (C4), an extension (C8) and arithmetic coding's tables (CC).
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if frame is not None:
                return None
            frame = marker
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
