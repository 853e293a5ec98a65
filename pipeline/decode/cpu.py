"""Decodes images on the CPU, to pixels of the model's input size; errors are values."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from cvt.preprocessing import Preprocessor
from pipeline.decode.bounds import (
    MAX_BLOCK_WORK,
    MAX_EXIF_BYTES,
    MAX_PARTS,
    TIMEOUT_S,
    DecodeDeadline,
    open_image,
    read_tile_size,
)
from pipeline.decode.direct import parse_jpeg, parse_png
from pipeline.decode.plugins import REQUIREMENTS, read_avif, read_heif, read_jxl
from pipeline.decode.repair import ORIENTATION_TEXTS, add_end, remove_metadata
from pipeline.predictions import ErrorCategory, SampleError, sample_error
from pipeline.read import Chunk
from pipeline.statistics import DECODE, StageMetrics, StageTimer
from pipeline.text import single_line

if TYPE_CHECKING:
    from torch import Tensor

#: Name, first bytes and reader of each format. `Image.open` is not used: its pixel limit is global to the
#: process, and its error does not contain the size of the image.
FORMATS: tuple[tuple[str, re.Pattern[bytes], Callable[[Any], ImageFile]], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    ("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
    ("GIF", re.compile(rb"GIF8[79]a"), GifImageFile),
    ("BMP", re.compile(rb"BM"), BmpImageFile),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
    ("AVIF", re.compile(rb"....ftyp(?:....){,16}?avi[fs]", re.DOTALL), read_avif),
    ("HEIF", re.compile(rb"....ftyp(?:....){,16}?(?:he[iv][cmsx]|m[is]f1)", re.DOTALL), read_heif),
    ("JPEG XL", re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"), read_jxl),
)

#: Maximum length of a side in pixels. Resizing needs memory and time in proportion to the longest side: about
#: 30 MB at this limit, gigabytes for the longest row that a PNG can have.
MAX_SIDE = 1 << 20

#: Decoding a chunk takes at most this number times the maximum time of an image.
CHUNK_TIMEOUTS = 10


class Orientation(NamedTuple):
    """How to turn a stored image upright: by Pillow's method, or transpose if `swaps_sides`, then mirror."""

    method: Image.Transpose
    swaps_sides: bool
    flips_horizontally: bool
    flips_vertically: bool


#: Values of the EXIF tag Orientation; 1 is upright.
_ORIENTATIONS = {
    2: Orientation(Image.Transpose.FLIP_LEFT_RIGHT, False, True, False),
    3: Orientation(Image.Transpose.ROTATE_180, False, True, True),
    4: Orientation(Image.Transpose.FLIP_TOP_BOTTOM, False, False, True),
    5: Orientation(Image.Transpose.TRANSPOSE, True, False, False),
    6: Orientation(Image.Transpose.ROTATE_270, True, True, False),
    7: Orientation(Image.Transpose.TRANSVERSE, True, True, True),
    8: Orientation(Image.Transpose.ROTATE_90, True, False, True),
}

_N = TypeVar("_N", int, float)


class Decoded(NamedTuple):
    """One decoded image, or its error.

    Attributes:
        pixels: uint8 of shape (size, size, 3), RGB; None for an error.
        width, height: size of the source image in pixels, as displayed (after EXIF orientation). For an
            error, the size in the header; None if it can't be read or does not fit into int32.
        error: the same text at every attempt.
    """

    pixels: np.ndarray | None
    width: int | None
    height: int | None
    error: SampleError | None


class DecodeOptions(NamedTuple):
    """How to decode an image.

    Attributes:
        max_pixels: maximum number of pixels according to the header; a larger image is an error. For WebP,
            GIF and TIFF, Pillow has a limit of its own: 2 * PIL.Image.MAX_IMAGE_PIXELS, 179 million.
        fast: decode a JPEG of at least twice the needed size at 1/2, 1/4 or 1/8 of its size.
        timeout_s: maximum CPU time in seconds; an image that takes longer is an error.
    """

    preprocessor: Preprocessor
    max_pixels: int
    fast: bool = False
    timeout_s: float = TIMEOUT_S


#: Decodes an image as `decode` does.
ImageDecoder = Callable[[bytes, DecodeOptions], Decoded]

#: Decoders of formats in a child process, by format. Empty in the child itself.
child_decoders: dict[str, ImageDecoder] = {}


def hide_pillow_warnings() -> None:
    """Hides Pillow's warnings in this process: damaged metadata would fill the logs of a run."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(data: bytes, options: DecodeOptions) -> Decoded:
    """Decodes an image, turns it upright, converts it to RGB, and resizes and crops it.

    Decodes the first frame of an animation and the first page of a document. Transparency is dropped, as in
    the pipelines of transformers: the stored color is used. Gray images with 12 or 16 bits are scaled to 8
    bits. 32-bit integers and floats have no defined white, and are clipped to 0..255. Damaged metadata is not
    an error, and neither is a JPEG without its last two bytes. Other incomplete images are errors.
    """
    matched = next((entry for entry in FORMATS if entry[1].match(data)), None)
    if matched is None:
        return Decoded(None, None, None, unsupported_format(data))
    name, _, reader = matched
    if name in child_decoders:
        return child_decoders[name](data, options)
    deadline = DecodeDeadline(options.timeout_s)
    read = partial(open_image, reader, deadline=deadline)
    if name == "PNG":  # Pillow needs much memory for many chunks
        data = remove_metadata(data, ORIENTATION_TEXTS)
    decoded = _decode_directly(name, data, options) or _decode(name, data, read, options)
    if decoded.error is not None and decoded.error.startswith(ErrorCategory.CANNOT_DECODE):
        repaired = data
        if name == "PNG":
            repaired = remove_metadata(data)
        elif name == "JPEG" and decoded.width is not None:  # the size has been checked
            repaired = add_end(data, deadline)
        if repaired != data:
            again = _decode(name, repaired, read, options)
            decoded = again if again.error is None else decoded
    if deadline.is_over:  # the decoder may have changed or ignored the exception, or not read since
        detail = single_line(f"{name}: {deadline.message}")
        return decoded._replace(pixels=None, error=sample_error(ErrorCategory.CANNOT_DECODE, detail))
    return decoded


def _decode_directly(name: str, data: bytes, options: DecodeOptions) -> Decoded | None:
    """Decodes a small usual PNG or JPEG as `_decode` does; returns None for others and after errors."""
    if len(data) > MAX_PARTS:  # it may have too many parts, or take too long
        return None
    with suppress(Exception):  # `_decode` reports the error
        frame = parse_png(data) if name == "PNG" else None
        if name == "JPEG" and not options.fast:
            frame = parse_jpeg(data)
        if frame is not None:
            width, height = frame[1]
            work = width * height * len(data)
            if 0 < work <= MAX_BLOCK_WORK and not size_error(width, height, options.max_pixels):
                image = _to_rgb(Image.frombytes(*frame))
                return Decoded(options.preprocessor(image), width, height, None)
    return None


def _decode(name: str, data: bytes, read: Callable[[bytes], ImageFile], options: DecodeOptions) -> Decoded:
    """Decodes an image that `read` opens; see `decode`."""
    width, height = None, None
    try:
        tile = read_tile_size(data) if name == "TIFF" else (0, 0)  # libtiff decodes whole tiles
        file = read(data)
        if max(file.size) < 1 << 31:  # the columns are int32
            width, height = file.size
        elif name == "BMP":  # a negative number, which Pillow reads as unsigned
            raise ValueError("negative width or height")
        if error := size_error(*file.size, options.max_pixels) or size_error(*tile, options.max_pixels):
            return Decoded(None, width, height, error)
        if options.fast and isinstance(file, JpegImageFile):
            scaled = _decode_scaled(file, options.preprocessor)
            if scaled is not None:
                return scaled
        file.load()
        image = _to_rgb(file)
        orientation = read_orientation(file)  # None for a TIFF, which Pillow turns upright itself
        if orientation is not None:
            image = image.transpose(orientation.method)
        return Decoded(options.preprocessor(image), *image.size, None)
    except Image.DecompressionBombError as error:
        return Decoded(None, width, height, sample_error(ErrorCategory.DIMENSIONS_TOO_LARGE, str(error)))
    except ImportError as error:
        detail = f"{name} needs {REQUIREMENTS[name]} (pip install '{REQUIREMENTS[name]}'): {error}"
        return Decoded(None, None, None, sample_error(ErrorCategory.UNSUPPORTED_FORMAT, single_line(detail)))
    # A broken or hostile file can raise any exception, among them OSError, ValueError, SyntaxError,
    # struct.error, zlib.error and MemoryError.
    except Exception as error:
        detail = single_line(f"{name}: {_describe(error)}")
        return Decoded(None, width, height, sample_error(ErrorCategory.CANNOT_DECODE, detail))


def _decode_scaled(file: JpegImageFile, preprocessor: Preprocessor) -> Decoded | None:
    """Decodes a JPEG at a fraction of its size; returns None if the JPEG is too small."""
    orientation = read_orientation(file)
    size = displayed_size(file.size, orientation)
    draft = file.draft(file.mode, displayed_size(preprocessor.resized_size(*size), orientation))
    if draft is None:
        return None
    file.load()
    image = _to_rgb(file)
    # The source may cover the last pixels only in part. Turning upright may make them the first pixels.
    width, height = displayed_size(draft[1][2:], orientation)
    left = top = 0.0
    if orientation is not None:
        image = image.transpose(orientation.method)
        left = image.width - width if orientation.flips_horizontally else 0.0
        top = image.height - height if orientation.flips_vertically else 0.0
    return Decoded(preprocessor(image, size, (left, top, left + width, top + height)), *size, None)


def displayed_size(size: tuple[_N, _N], orientation: Orientation | None) -> tuple[_N, _N]:
    """Converts a stored width and height to the displayed ones, or back."""
    return (size[1], size[0]) if orientation is not None and orientation.swaps_sides else size


def unsupported_format(data: bytes) -> SampleError:
    """Returns the error of an image that has none of the formats."""
    if not data:
        return sample_error(ErrorCategory.EMPTY_IMAGE, "the file has no bytes")
    names = ", ".join(name for name, _, _ in FORMATS)
    detail = f"the file starts with {data[:12]!r}; supported formats are {names}"
    return sample_error(ErrorCategory.UNSUPPORTED_FORMAT, detail)


def size_error(width: int, height: int, max_pixels: int) -> SampleError | None:
    """Returns the error of an image of this size in pixels, or None if the size is allowed."""
    if width * height > max_pixels:
        limit = f"more than the limit of {max_pixels} pixels (input.max_image_pixels)"
    elif max(width, height) > MAX_SIDE:
        limit = f"with a side longer than {MAX_SIDE} pixels"
    else:
        return None
    return sample_error(ErrorCategory.DIMENSIONS_TOO_LARGE, f"{width} x {height} pixels, {limit}")


def _to_rgb(file: Image.Image) -> Image.Image:
    """Returns the image in mode RGB, without a copy if it is RGB already."""
    if file.mode == "RGB":
        return file
    if file.mode.startswith("I;16"):
        # Pillow would clip to 0..255, which would make almost every pixel white.
        bits = file.tag_v2[BITSPERSAMPLE][0] if isinstance(file, TiffImageFile) else 16
        gray = np.asarray(file) >> (bits - 8)
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    # Transparency is dropped, and Pillow fails on its rarer forms.
    file.info.pop("transparency", None)
    if file.mode == "La":
        return file.convert("LA").convert("RGB")
    return file.convert("RGB")


def read_orientation(file: ImageFile) -> Orientation | None:
    """Returns the orientation as PIL.ImageOps.exif_transpose does; None if upright or if EXIF is damaged."""
    try:
        if any(len(file.info.get(name, b"")) > MAX_EXIF_BYTES for name in ("exif", "Raw profile type exif")):
            return None
        return _ORIENTATIONS.get(file.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return None


def _describe(error: Exception) -> str:
    kind, text = type(error).__name__, str(error)
    if not text:
        return kind
    # The texts of these exceptions are messages; the text of a KeyError, for example, is not.
    return text if isinstance(error, OSError | SyntaxError | ValueError) else f"{kind}: {text}"


def decode_chunk(chunk: Chunk, options: DecodeOptions, decode_image: ImageDecoder = decode) -> Chunk:
    """Decodes the images of a chunk: replaces `image` by pixels, `width` and `height`; see `decode`.

    The images share half of the time of the chunk equally. The other half is for slow images, in order.
    """
    samples, timeout_s = chunk.samples, options.timeout_s
    size = options.preprocessor.size
    pixels = np.empty((samples.num_rows, size, size, 3), np.uint8)
    outcomes, decoded_count = [], 0
    left = CHUNK_TIMEOUTS / 2 * timeout_s
    # One of two limits, so that an error has the same text at every attempt.
    shared = options._replace(timeout_s=min(timeout_s, left / max(1, samples.num_rows)))
    timer = StageTimer()
    with timer:
        for image, error in zip(samples["image"], samples["error"].to_pylist(), strict=True):
            decoded = Decoded(None, None, None, error)
            if error is None:
                limits, start = options if left >= timeout_s else shared, monotonic()
                decoded = decode_image(image.as_buffer().to_pybytes(), limits)
                # The limit is one of CPU time, which is shorter.
                left -= min(limits.timeout_s, monotonic() - start)
            if decoded.pixels is not None:
                pixels[decoded_count] = decoded.pixels
                decoded_count += 1
            outcomes.append(decoded._replace(pixels=None))
    return decoded_chunk(chunk, outcomes, pixels[:decoded_count], timer.collect())


def decoded_chunk(
    chunk: Chunk, outcomes: Sequence[Decoded], pixels: np.ndarray | Tensor, metrics: StageMetrics
) -> Chunk:
    """Returns a chunk with pixels and with the `width`, `height` and `error` of each outcome."""
    samples = chunk.samples.drop_columns(["image", "error"])
    for name, kind in (("width", pa.int32()), ("height", pa.int32()), ("error", pa.string())):
        values = [getattr(outcome, name) for outcome in outcomes]
        samples = samples.append_column(name, pa.array(values, kind))
    metrics += StageMetrics(images=chunk.samples["error"].null_count, bytes=pixels.nbytes)
    return replace(chunk, samples=samples, pixels=pixels, metrics={**chunk.metrics, DECODE: metrics})
