"""Finds plain JPEGs: JPEGs that every decoder reads alike, as far as their headers show."""

import re
from typing import NamedTuple

from PIL.JpegImagePlugin import JpegImageFile

from pipeline.decode.bounds import TIMEOUT_S, DecodeDeadline, open_image
from pipeline.decode.cpu import Orientation, read_orientation, size_error
from pipeline.decode.repair import END_OF_IMAGE, START_OF_SCAN

#: The CPU decodes longer images: the GPU resizes the whole image, although cropping keeps little of it.
MAX_ASPECT_RATIO = 16

#: Maximum number of scans: a GPU has no timeout. Encoders write up to about ten.
MAX_SCANS = 64

#: Horizontal and vertical sampling factors of luminance, with color factors of 1 x 1: from 4:4:4 to 4:1:1.
SAMPLINGS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))

#: Frames without Huffman codes, or that are neither baseline, extended nor progressive.
_RARE_FRAME = re.compile(rb"\xff[\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]\0[\x0b\x11]\x08")


class PlainJpeg(NamedTuple):
    """A plain JPEG in a row of a chunk; its size in pixels is the stored one, before it is turned upright."""

    row: int
    data: bytes
    width: int
    height: int
    orientation: Orientation | None


def parse_plain_jpeg(row: int, data: bytes, max_pixels: int) -> PlainJpeg | None:
    """Returns the JPEG of a row if it is complete and its headers are usual, else None.

    Decoders differ or fail on unusual headers: colors other than gray and YCbCr, codes other than Huffman
    codes, rare sampling factors, many scans, very large or long images.
    """
    if not data.startswith(b"\xff\xd8\xff") or not data.endswith(END_OF_IMAGE):
        return None
    if data.count(START_OF_SCAN) > MAX_SCANS:
        return None
    try:
        file = open_image(JpegImageFile, data, DecodeDeadline(TIMEOUT_S))
        width, height = file.size
        components = [layer[0] for layer in file.layer]
        samplings = [layer[1:3] for layer in file.layer]
        assert file.fp is not None
        is_rare = _RARE_FRAME.search(data, 0, file.fp.tell()) is not None
    except Exception:  # the CPU decoder reports the error
        return None
    is_gray = samplings == [(1, 1)]
    # Adobe's marker and other component numbers may mean RGB.
    is_ycbcr = components == [1, 2, 3] and file.info.get("adobe_transform", 1) == 1
    is_ycbcr = is_ycbcr and samplings[0] in SAMPLINGS and samplings[1:] == [(1, 1)] * 2
    if is_rare or not (is_gray or is_ycbcr) or size_error(width, height, max_pixels):
        return None
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        return None
    return PlainJpeg(row, data, width, height, read_orientation(file))
