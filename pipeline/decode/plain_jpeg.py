"""Finds plain JPEGs: JPEGs that every decoder reads alike, as far as their headers show."""

import io
from dataclasses import dataclass

from PIL.JpegImagePlugin import JpegImageFile

from pipeline.decode.cpu import Orientation, pillow_warnings_ignored, read_orientation, size_error

#: The CPU decodes longer images: the GPU resizes the whole image, although cropping keeps little of it.
MAX_ASPECT_RATIO = 16

#: Markers of frames with Huffman codes: baseline, extended and progressive. Other frame markers up to 0xCF
#: are for lossless or hierarchical JPEGs, or for arithmetic coding.
HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
#: Markers in the same range that do not start a frame: Huffman tables, extension, tables of arithmetic
#: coding.
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)
START_OF_SCAN = 0xDA
END_OF_IMAGE = b"\xff\xd9"

#: Horizontal and vertical sampling factors of luminance, with color factors of 1 x 1: from 4:4:4 to 4:1:1.
SAMPLINGS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))


@dataclass(frozen=True, slots=True)
class PlainJpeg:
    """A plain JPEG.

    Attributes:
        row: row of the sample in the chunk.
        data: the encoded image.
        width, height: size in pixels, as stored.
        orientation: how to turn the image upright; None if it is upright.
    """

    row: int
    data: bytes
    width: int
    height: int
    orientation: Orientation | None


@pillow_warnings_ignored
def parse_plain_jpeg(row: int, data: bytes, max_pixels: int) -> PlainJpeg | None:
    """Returns the JPEG if it is complete and its headers are usual, else None.

    Decoders differ or fail on unusual headers: colors other than gray and YCbCr, codes other than Huffman
    codes, rare sampling factors, very large or long images.

    Args:
        row: row of the sample in the chunk.
        data: the encoded image.
        max_pixels: maximum number of pixels.
    """
    if not data.endswith(END_OF_IMAGE) or _frame_marker(data) not in HUFFMAN_FRAMES:
        return None
    try:
        file = JpegImageFile(io.BytesIO(data))
        width, height = file.size
        components = [layer[0] for layer in file.layer]
        samplings = [layer[1:3] for layer in file.layer]
    except Exception:  # the CPU decoder reports the error
        return None
    is_gray = samplings == [(1, 1)]
    # Adobe's marker and other component numbers may mean RGB.
    is_ycbcr = components == [1, 2, 3] and file.info.get("adobe_transform", 1) == 1
    is_ycbcr = is_ycbcr and samplings[0] in SAMPLINGS and samplings[1:] == [(1, 1)] * 2
    if not (is_gray or is_ycbcr) or size_error(width, height, max_pixels):
        return None
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        return None
    return PlainJpeg(row, data, width, height, read_orientation(file))


def _frame_marker(data: bytes) -> int | None:
    """Returns the marker of the frame; None unless one frame and no gaps precede the first scan."""
    frame, position = None, 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == START_OF_SCAN:
            return frame
        if 0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES:
            if frame is not None:
                return None
            frame = marker
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None
