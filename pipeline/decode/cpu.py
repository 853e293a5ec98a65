"""Decoding on the CPU: image bytes to pixels at the model's input size; errors are values.

Reads JPEG, PNG, WebP, GIF, BMP and TIFF with Pillow.
"""

import contextlib
import io
import re
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

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
from pipeline.predictions import ErrorCategory, SampleError, sample_error
from pipeline.read import Chunk
from pipeline.text import single_line

# First bytes and reader of each format. Image.open is not used: it has a pixel limit of its own, global
# to the process, and doesn't tell the size of what it refuses.
FORMATS: tuple[tuple[str, re.Pattern[bytes], type[ImageFile]], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    ("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
    ("GIF", re.compile(rb"GIF8[79]a"), GifImageFile),
    ("BMP", re.compile(rb"BM"), BmpImageFile),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
)

# Longest side in pixels. Resizing to a square takes memory and time by the longest side, however few
# pixels there are: some 30 MB here, gigabytes for the longest line that a PNG can hold.
MAX_SIDE = 1 << 20


class Turn(NamedTuple):
    """What makes a stored image upright: a transposition if `is_sideways`, then reflections."""

    method: Image.Transpose
    is_sideways: bool
    from_right: bool
    from_below: bool


# By EXIF orientation.
_TURNS = {
    2: Turn(Image.Transpose.FLIP_LEFT_RIGHT, False, True, False),
    3: Turn(Image.Transpose.ROTATE_180, False, True, True),
    4: Turn(Image.Transpose.FLIP_TOP_BOTTOM, False, False, True),
    5: Turn(Image.Transpose.TRANSPOSE, True, False, False),
    6: Turn(Image.Transpose.ROTATE_270, True, True, False),
    7: Turn(Image.Transpose.TRANSVERSE, True, True, True),
    8: Turn(Image.Transpose.ROTATE_90, True, False, True),
}

_N = TypeVar("_N", int, float)


class _PillowWarningsIgnored(contextlib.ContextDecorator):
    """Hides Pillow's warnings about damaged metadata, which would fill the logs; several threads may use it.

    `warnings.catch_warnings` alone is not thread-safe: the first thread enters it, the last one leaves it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._context = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._context = warnings.catch_warnings()
                self._context.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._context.__exit__(None, None, None)


pillow_warnings_ignored = _PillowWarningsIgnored()


class Decoded(NamedTuple):
    """One decoded image, or what is wrong with it.

    Attributes:
        pixels: uint8 of shape (size, size, 3), RGB; None where there is an error.
        width, height: of the source image in pixels, as displayed (after EXIF orientation); where there is
            an error, as the header says, or None where the header can't be read.
        error: None, or `<category>: <detail>` with a detail of at most `MAX_LINE_LENGTH` characters; every
            attempt returns the same text.
    """

    pixels: np.ndarray | None
    width: int | None
    height: int | None
    error: SampleError | None


@pillow_warnings_ignored
def decode(data: bytes, preprocessor: Preprocessor, max_pixels: int, fast: bool = False) -> Decoded:
    """Decodes one image, turns it upright, converts it to RGB, and resizes and crops it.

    Takes the first frame of an animation and the first page of a document. Transparency is dropped, as in
    transformers' pipelines: the color stored under it shows. Gray images with 12 or 16 bits are scaled to
    8; 32-bit integers and floats, which have no agreed white, are clipped to 0..255. Damaged metadata is
    no error, an incomplete image is one.

    More than `max_pixels` are an error, found in the header. (For WebP and TIFF, Pillow has a further limit,
    2 * PIL.Image.MAX_IMAGE_PIXELS: 179 million.) With `fast`, a JPEG of at least twice the needed size is
    decoded at a half, a quarter or an eighth of its size, by libjpeg in the inverse cosine transform.
    """
    known = next((known for known in FORMATS if known[1].match(data)), None)
    if known is None:
        return Decoded(None, None, None, _unknown(data))
    name, _, reader = known
    width, height = None, None
    try:
        file = reader(io.BytesIO(data))
        width, height = file.size
        if error := too_large(width, height, max_pixels):
            return Decoded(None, width, height, error)
        if fast and isinstance(file, JpegImageFile) and (scaled := _decode_scaled(file, preprocessor)):
            return scaled
        file.load()
        image = _to_rgb(file)
        if (turn := turn_of(file)) is not None:  # Pillow has turned a TIFF by now
            image = image.transpose(turn.method)
        return Decoded(preprocessor(image), *image.size, None)
    # Not only OSError: ValueError, SyntaxError, struct.error, zlib.error, MemoryError, DecompressionBombError
    # and whatever else Pillow runs into in a broken or hostile file.
    except Exception as error:
        detail = single_line(f"{name}: {_cause(error)}")
        return Decoded(None, width, height, sample_error(ErrorCategory.CANNOT_DECODE, detail))


def _decode_scaled(file: JpegImageFile, preprocessor: Preprocessor) -> Decoded | None:
    """Decodes a JPEG at a fraction of its size; None if it isn't large enough for that."""
    turn = turn_of(file)
    size = exchanged(file.size, turn)
    drafted = file.draft(file.mode, exchanged(preprocessor.resized_size(*size), turn))
    if drafted is None:
        return None
    file.load()
    image = _to_rgb(file)
    # The last pixels, which a turn may make the first, may be of the source in part only.
    width, height = exchanged(drafted[1][2:], turn)
    left = top = 0.0
    if turn is not None:
        image = image.transpose(turn.method)
        left = image.width - width if turn.from_right else 0.0
        top = image.height - height if turn.from_below else 0.0
    return Decoded(preprocessor(image, size, (left, top, left + width, top + height)), *size, None)


def exchanged(size: tuple[_N, _N], turn: Turn | None) -> tuple[_N, _N]:
    """A width and height after a turn, or what they were before it."""
    return (size[1], size[0]) if turn is not None and turn.is_sideways else size


def _unknown(data: bytes) -> SampleError:
    if not data:
        return sample_error(ErrorCategory.EMPTY_IMAGE, "the file has no bytes")
    names = ", ".join(name for name, _, _ in FORMATS)
    detail = f"the file starts with {data[:12]!r}; supported formats are {names}"
    return sample_error(ErrorCategory.UNSUPPORTED_FORMAT, detail)


def too_large(width: int, height: int, max_pixels: int) -> SampleError | None:
    """What is wrong with an image of this size, in pixels; None if nothing is."""
    if width * height > max_pixels:
        limit = f"more than the limit of {max_pixels} pixels (input.max_image_pixels)"
    elif max(width, height) > MAX_SIDE:
        limit = f"with a side longer than {MAX_SIDE} pixels"
    else:
        return None
    return sample_error(ErrorCategory.DIMENSIONS_TOO_LARGE, f"{width} x {height} pixels, {limit}")


def _to_rgb(file: ImageFile) -> Image.Image:
    """The image in mode RGB; not a copy where it is RGB already."""
    if file.mode == "RGB":
        return file
    if file.mode.startswith("I;16"):
        # Pillow would clip to 0..255, which makes nearly everything white.
        bits = file.tag_v2[BITSPERSAMPLE][0] if isinstance(file, TiffImageFile) else 16
        gray = np.asarray(file) >> (bits - 8)
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    # Not wanted in the result, and Pillow stumbles over the more unusual kinds.
    file.info.pop("transparency", None)
    if file.mode == "La":
        return file.convert("LA").convert("RGB")
    return file.convert("RGB")


def turn_of(file: ImageFile) -> Turn | None:
    """As in PIL.ImageOps.exif_transpose, but None if EXIF is damaged."""
    try:
        return _TURNS.get(file.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return None


def _cause(error: Exception) -> str:
    kind, text = type(error).__name__, str(error)
    if not text:
        return kind
    # These speak for themselves; a KeyError, say, doesn't.
    return text if isinstance(error, OSError | SyntaxError | ValueError) else f"{kind}: {text}"


def decode_chunk(chunk: Chunk, preprocessor: Preprocessor, max_pixels: int, fast: bool = False) -> Chunk:
    """Replaces the column `image` of a chunk by pixels and the columns `width` and `height`; see `decode`."""
    samples = chunk.samples
    size = preprocessor.size
    pixels = np.empty((samples.num_rows, size, size, 3), np.uint8)
    outcomes, good = [], 0
    for image, error in zip(samples["image"], samples["error"].to_pylist(), strict=True):
        decoded = Decoded(None, None, None, error)
        if error is None:
            decoded = decode(image.as_buffer().to_pybytes(), preprocessor, max_pixels, fast)
        if decoded.pixels is not None:
            pixels[good] = decoded.pixels
            good += 1
        outcomes.append(decoded._replace(pixels=None))
    return replace(chunk, samples=with_outcomes(samples, outcomes), pixels=pixels[:good])


def with_outcomes(samples: pa.Table, outcomes: Sequence[Decoded]) -> pa.Table:
    """The samples with what their decoding said (but for pixels) in place of the encoded images."""
    samples = samples.drop_columns(["image", "error"])
    for name, kind in (("width", pa.int32()), ("height", pa.int32()), ("error", pa.string())):
        samples = samples.append_column(name, pa.array([getattr(o, name) for o in outcomes], kind))
    return samples
