"""Readers of AVIF, HEIF and JPEG XL, for child processes: their libraries may crash or need much memory."""

from typing import Any, cast

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

#: What to install if a reader raises ImportError.
REQUIREMENTS = {"AVIF": "pillow>=11.3", "HEIF": "cvt-label[heif]", "JPEG XL": "cvt-label[jxl]"}


def read_avif(file: Any) -> ImageFile:
    """Opens an AVIF file."""
    from PIL import AvifImagePlugin, _avif  # noqa: F401 (missing if Pillow was built without AVIF)

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the time limit is one of the calling thread
    return AvifImagePlugin.AvifImageFile(file)


def read_heif(file: Any) -> ImageFile:
    """Opens the primary image of a HEIF file; raises ValueError if the file is incomplete."""
    import pillow_heif

    data, position = file.read(), 0
    while position < len(data):  # libheif replaces missing tiles by a color
        kind, start = data[position + 4 : position + 8], data[position : position + 16]
        size = int.from_bytes(start[8:] if start[:4] == b"\0\0\0\1" else start[:4]) or len(data)
        if kind == b"mdat" and start[:4] != bytes(4) and position + size > len(data):
            raise ValueError("the file is truncated")
        position += max(8, size)
    pillow_heif.options.DECODE_THREADS = 1
    image: ImageFile = pillow_heif.HeifImageFile(file)
    return image


def read_jxl(file: Any) -> ImageFile:
    """Decodes the first frame of a JPEG XL file, upright; raises ValueError unless a sample has 8 bits."""
    from imagecodecs import jpegxl_decode

    pixels = jpegxl_decode(file.read(), index=0, numthreads=1)
    # The library neither scales samples with other depths, nor returns the depth. Of 1 bit, the maximum is 1.
    if pixels.dtype != np.uint8 or pixels.max() == 1:
        raise ValueError("not 8 bits per sample; save the image with 8 bits")
    image = cast(ImageFile, Image.fromarray(pixels))
    image.format = "JPEG XL"
    return image
