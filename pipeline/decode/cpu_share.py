"""Divides the JPEGs of a classifier between nvJPEG and its CPU threads (`decode.cpu_share`).

The pixels of the two decoders differ by rounding and by the upsampling of colors. A division that followed
the clock would give other labels at each attempt. So the file alone decides, and the rates of both decoders
are measured before the run, by `cvt-label benchmark gpu`.
"""

import zlib

#: The last bytes of a JPEG are compressed pixels: they differ between images, and their hash takes 1 us.
_HASHED_BYTES = 1024


def is_for_cpu(data: bytes, share: float) -> bool:
    """Returns whether the CPU decodes a file; true for a fraction `share` of all files."""
    return share > 0 and zlib.crc32(data[-_HASHED_BYTES:]) < share * 2**32


def balanced_share(cpu_images_per_s: float, gpu_images_per_s: float) -> float:
    """Returns the share at which both decoders finish at the same time, rounded to 1 %.

    The rates are those of all CPU threads together, and of the GPU alone, in images/s.
    """
    return round(cpu_images_per_s / (cpu_images_per_s + gpu_images_per_s), 2)
