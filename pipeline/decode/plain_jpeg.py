"""Finds plain JPEGs: JPEGs that every decoder reads alike, as far as their headers show."""

from dataclasses import dataclass

from PIL.JpegImagePlugin import JpegImageFile

from pipeline.decode.bounds import HUFFMAN_FRAMES, TIMEOUT_S, DecodeDeadline, jpeg_frame, open_image
from pipeline.decode.cpu import Orientation, pillow_warnings_ignored, read_orientation, size_error
from pipeline.decode.repair import END_OF_IMAGE

#: The CPU decodes longer images: the GPU resizes the whole image, although cropping keeps little of it.
MAX_ASPECT_RATIO = 16

#: Maximum number of scans: a GPU has no timeout. Encoders write up to about ten.
MAX_SCANS = 64
START_OF_SCAN = b"\xff\xda"

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
    codes, rare sampling factors, many scans, very large or long images.

    Args:
        row: row of the sample in the chunk.
        data: the encoded image.
        max_pixels: maximum number of pixels.
    """
    frame = jpeg_frame(data)
    if not data.endswith(END_OF_IMAGE) or frame is None or frame[0] not in HUFFMAN_FRAMES:
        return None
    if data.count(START_OF_SCAN) > MAX_SCANS:
        return None
    try:
        file = open_image("JPEG", JpegImageFile, data, DecodeDeadline(TIMEOUT_S))
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
