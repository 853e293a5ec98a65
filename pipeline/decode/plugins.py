"""Readers of AVIF, HEIF and JPEG XL, for child processes: their libraries may crash or need much memory."""

import re
from typing import Any

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

#: What to install if a reader raises ImportError.
REQUIREMENTS = {"AVIF": "pillow>=11.3", "HEIF": "cvt-label[heif]", "JPEG XL": "cvt-label[jxl]"}

# The start of the codestream, in its box or without a container.
_JXL_HEADER = re.compile(rb"(?:\A|jxlc|jxlp....)\xff\x0a(.{,64})", re.DOTALL)
_JXL_RATIOS = ((1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


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


class JxlFile(ImageFile):
    """A JPEG XL file. Its size is the stored one; `load` decodes the first frame, upright and with 8 bits."""

    format = "JPEG XL"

    def _open(self) -> None:
        from imagecodecs import jpegxl_decode

        assert self.fp is not None
        self._decode, self._data = jpegxl_decode, self.fp.read()
        width, height, self._bits = read_jxl_header(self._data)
        self._size, self._mode = (width, height), "RGB"

    def load(self) -> Any:
        """Decodes the image."""
        pixels = self._decode(self._data, index=0, numthreads=1)
        if pixels.dtype.kind == "f":  # 1 is white
            pixels = np.nan_to_num(pixels).clip(0, 1) * 255
        elif self._bits != 8:  # the library does not scale integers
            pixels = pixels >> self._bits - 8 if self._bits > 8 else pixels * (255 / ((1 << self._bits) - 1))
        image = Image.fromarray(pixels.astype(np.uint8, copy=False))
        self.im, self._mode, self._size = image.im, image.mode, image.size
        return self.im.pixel_access(False)


def read_jxl_header(data: bytes) -> tuple[int, int, int]:
    """Returns stored width, height and bits per sample of a JPEG XL file (ISO/IEC 18181-1, annex D)."""
    found = _JXL_HEADER.search(data)
    bits = int.from_bytes(found[1], "little") if found else 0

    def number(*choices: tuple[int, int]) -> int:
        nonlocal bits
        selector, bits = (bits & 3, bits >> 2) if len(choices) > 1 else (0, bits)
        first, size = choices[selector]
        value, bits = bits & ((1 << size) - 1), bits >> size
        return first + value

    def image_size() -> tuple[int, int]:
        is_small = number((0, 1))
        sides = ((1, 5),) if is_small else ((1, 9), (1, 13), (1, 18), (1, 30))
        height, ratio = number(*sides), number((0, 3))
        numerator, denominator = _JXL_RATIOS[ratio - 1]
        unit = 8 if is_small else 1
        return unit * height * numerator // denominator if ratio else unit * number(*sides), unit * height

    size = image_size()
    if number((0, 1)):  # all other fields have their defaults
        return *size, 8
    if number((0, 1)):
        number((0, 3))  # orientation
        if number((0, 1)):
            image_size()  # the size for display
        if number((0, 1)):
            raise ValueError("the file contains a preview")
        if number((0, 1)):  # an animation: ticks per second, number of loops, time codes
            number((100, 0), (1000, 0), (1, 10), (1, 30))
            number((1, 0), (1001, 0), (1, 8), (1, 10))
            number((0, 0), (0, 3), (0, 16), (0, 32))
            number((0, 1))
    is_float = number((0, 1))
    return *size, 32 if is_float else number((8, 0), (10, 0), (12, 0), (1, 6))
