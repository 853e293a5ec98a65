"""Decoding on the CPU: every format and mode becomes RGB as in transformers, and bad images never raise."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow as pa
import pytest
from PIL import ExifTags, Image, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from transformers.image_utils import load_image

from cvt.preprocessing import Preprocessor
from pipeline.decode import DecodeOptions, decode, decode_chunk
from pipeline.decode.bounds import DecodeDeadline
from pipeline.decode.cpu import MAX_SIDE, Decoded, _decode_directly
from pipeline.predictions import ErrorCategory, sample_error
from pipeline.read import Chunk
from pipeline.text import MAX_LINE_LENGTH, single_line
from tests.makers import category_of

PREPROCESSOR = Preprocessor.from_dict({"size": 32}, "test")
LIMIT = 1_000_000
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]

# Pillow's warnings about these unusual images are expected.
pytestmark = pytest.mark.filterwarnings("ignore")


def picture(mode: str = "RGB", size: tuple[int, int] = (56, 40)) -> Image.Image:
    """Smooth colors, different in each corner, so that rotations and swapped channels are detected."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([x, y, 255 - (x + y) / 2], -1).astype(np.uint8))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray((255 - x).astype(np.uint8)))
    return image.convert(mode)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png(width: int, height: int, depth: int, color: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG that Pillow can't write; `extra` are chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def with_tiff_tags(data: bytes, values: dict[int, int]) -> bytes:
    """A TIFF with changed tags; each tag has one number."""
    changed = bytearray(data)
    directory = int.from_bytes(data[4:8], "little")
    for entry in range(int.from_bytes(data[directory : directory + 2], "little")):
        offset = directory + 2 + 12 * entry
        tag, kind, count = struct.unpack_from("<HHI", data, offset)
        if tag in values:
            assert count == 1
            struct.pack_into("<H" if kind == 3 else "<I", changed, offset + 8, values[tag])
    return bytes(changed)


def load_with_transformers(data: bytes) -> Image.Image:
    """Loads an image as the image-classification pipeline of transformers does: upright and RGB."""
    return load_image(PIL.Image.open(io.BytesIO(data)))


def decoded(data: bytes, max_pixels: int = LIMIT) -> Decoded:
    """Decodes, and asserts the properties of every result."""
    result = decode(data, DecodeOptions(PREPROCESSOR, max_pixels))
    if result.error is None:
        assert result.pixels is not None
        assert result.pixels.shape == (32, 32, 3)
        assert result.pixels.dtype == np.uint8
        assert result.width is not None
        assert result.height is not None
    else:
        assert result.pixels is None
        category = category_of(result.error)
        assert len(result.error) <= len(f"{category}: ") + MAX_LINE_LENGTH
        assert result.error.isprintable()
        assert " at 0x" not in result.error
    return result


def assert_decodes_to(data: bytes, expected: Image.Image) -> None:
    result = decoded(data)
    assert result.error is None
    assert (result.width, result.height) == expected.size
    np.testing.assert_array_equal(result.pixels, PREPROCESSOR(expected))


# --- formats and modes -----------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_decoded(format: str) -> None:
    data = encode(picture(), format)
    assert_decodes_to(data, load_with_transformers(data))
    close = np.abs(decoded(data).pixels - PREPROCESSOR(picture()).astype(np.float32)).mean()
    assert close < (12 if format == "GIF" else 3)  # GIF has only 256 colors


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("WEBP", mode) for mode in ("L", "RGB", "RGBA")),
        *(("GIF", mode) for mode in ("1", "L", "P", "RGBA")),
        *(("BMP", mode) for mode in ("1", "L", "P", "RGB", "RGBA")),
        *(("TIFF", mode) for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA", "CMYK")),
        *(("TIFF", mode) for mode in ("YCbCr", "LAB", "I", "F")),
    ],
)
def test_every_mode_becomes_rgb_as_in_transformers(format: str, mode: str) -> None:
    data = encode(picture(mode), format)
    assert_decodes_to(data, load_with_transformers(data))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg"])
def test_tiff_compressions_are_decoded(compression: str) -> None:
    data = encode(picture(), "TIFF", compression=compression)
    assert_decodes_to(data, load_with_transformers(data))


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
def test_jpeg_variants_are_decoded(options: dict[str, object]) -> None:
    data = encode(picture(), "JPEG", **options)
    assert_decodes_to(data, load_with_transformers(data))


@pytest.mark.parametrize("transform", [0, 2])
def test_adobe_cmyk_jpegs_are_not_inverted(transform: int) -> None:
    # Pillow writes inverted CMYK with Adobe's marker. The last byte of the marker can declare the data as
    # YCCK.
    data = bytearray(encode(Image.new("CMYK", (56, 40), (0, 255, 255, 0)), "JPEG", quality=95))
    data[data.index(b"Adobe") + 11] = transform
    assert_decodes_to(bytes(data), load_with_transformers(bytes(data)))
    if transform == 0:
        red, green, blue = decoded(bytes(data)).pixels.reshape(-1, 3).mean(0)
        assert red > 250
        assert max(green, blue) < 5


def palette_with_many_alphas() -> bytes:
    return encode(picture("RGB").quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))


def gif_with_a_transparency_beyond_its_palette() -> bytes:
    data = bytearray(encode(picture().quantize(16), "GIF", transparency=3))
    data[data.index(b"\x21\xf9\x04") + 6] = 255
    return bytes(data)


@pytest.mark.parametrize(
    "make",
    [
        lambda: encode(picture("P"), "PNG", transparency=7),
        palette_with_many_alphas,
        lambda: encode(picture("L"), "PNG", transparency=7),
        lambda: encode(picture("RGB"), "PNG", transparency=(1, 2, 3)),
        lambda: encode(picture("1"), "PNG", transparency=0),
        lambda: encode(picture().quantize(16), "GIF", transparency=3),
        gif_with_a_transparency_beyond_its_palette,
    ],
    ids=["palette-index", "palette-alphas", "gray", "rgb", "bilevel", "gif", "gif-beyond-palette"],
)
def test_transparency_is_dropped_as_in_transformers(make: Callable[[], bytes]) -> None:
    data = make()
    assert_decodes_to(data, load_with_transformers(data))


def test_color_under_full_transparency_is_kept() -> None:
    data = encode(Image.new("RGBA", (56, 40), (10, 200, 30, 0)), "PNG")
    assert (decoded(data).pixels == (10, 200, 30)).all()


GRAY16 = np.linspace(0, 65535, 56 * 40).astype(np.uint16).reshape(40, 56)


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.fromarray(GRAY16), "PNG"),
        encode(Image.fromarray(GRAY16), "TIFF"),
        encode(Image.fromarray(GRAY16), "TIFF", compression="tiff_lzw"),
        encode(Image.frombytes("I;16B", (56, 40), GRAY16.astype(">u2").tobytes()), "TIFF"),
    ],
    ids=["png", "tiff", "tiff-lzw", "tiff-big-endian"],
)
def test_16_bit_gray_is_scaled_not_clipped(data: bytes) -> None:
    gray = Image.fromarray((GRAY16 >> 8).astype(np.uint8))
    assert_decodes_to(data, gray.convert("RGB"))
    assert np.unique(decoded(data).pixels).size > 100


def test_12_bit_gray_is_scaled_to_its_white() -> None:
    # Three bytes hold two pixels. The width and depth of an 8-bit TIFF are rewritten.
    tiff_8_bit = encode(Image.frombytes("L", (84, 40), b"\xff\xf8\x00" * 28 * 40), "TIFF")
    packed = with_tiff_tags(tiff_8_bit, {256: 56, 258: 12})
    expected = np.tile(np.uint8([[255, 128]]), (40, 28))
    assert_decodes_to(packed, Image.fromarray(expected).convert("RGB"))


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_color_is_scaled_not_clipped(color: int, channels: int) -> None:
    values = np.repeat(GRAY16[..., None], channels, -1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    gray = Image.fromarray((GRAY16 >> 8).astype(np.uint8))
    assert_decodes_to(png(56, 40, 16, color, rows), gray.convert("RGB"))


@pytest.mark.parametrize(("kind", "number"), [(np.int32, "I"), (np.float32, "F")])
def test_32_bit_integers_and_floats_are_clipped(kind: type, number: str) -> None:
    values = np.linspace(-100, 1000, 56 * 40).astype(kind).reshape(40, 56)
    image = Image.fromarray(values)
    assert image.mode == number
    expected = Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    assert_decodes_to(encode(image, "TIFF"), expected)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_or_page_is_decoded(format: str) -> None:
    first, others = picture(), [picture().rotate(angle) for angle in (90, 180)]
    data = encode(first, format, save_all=True, append_images=others)
    assert PIL.Image.open(io.BytesIO(data)).n_frames == 3
    assert_decodes_to(data, load_with_transformers(data))
    alone = decoded(encode(first, format)).pixels.astype(np.float32)
    assert np.abs(decoded(data).pixels - alone).mean() < 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    ("size", "scale"), [((90, 60), 1), ((190, 150), 4), ((640, 800), 16), ((75, 2000), 2)]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_fast_jpeg_decoding_is_close_and_reports_the_true_size(
    mode: str, size: tuple[int, int], scale: int, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(picture(mode, size), "JPEG", quality=95, exif=exif)
    exact, fast = (
        decode(data, DecodeOptions(PREPROCESSOR, LIMIT * 2)),
        decode(data, DecodeOptions(PREPROCESSOR, LIMIT * 2, fast=True)),
    )
    assert fast[1:] == exact[1:]
    assert exact.pixels is not None
    assert fast.pixels is not None
    difference = np.abs(exact.pixels.astype(int) - fast.pixels)
    assert difference.mean() < 2
    assert (difference.max() > 0) == (scale > 1)


@pytest.mark.parametrize("size", [(163, 117), (150, 190), (201, 201)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_fast_decoding_keeps_the_position_of_a_rotated_image(orientation: int, size: tuple[int, int]) -> None:
    """The sizes are not multiples of the scale, so the source covers the last pixels only in part."""
    data = encode(picture(size=size), "JPEG", quality=98, subsampling=0, exif=exif(orientation))
    exact, fast = (
        decode(data, DecodeOptions(PREPROCESSOR, LIMIT, fast=fast)).pixels for fast in (False, True)
    )
    assert exact is not None
    assert fast is not None
    # The difference would be at least 0.9 if the position of these pixels were ignored.
    assert np.abs(exact.astype(int) - fast).mean() < 0.5


@pytest.mark.parametrize("format", FORMATS)
def test_fast_decoding_affects_only_jpegs(format: str) -> None:
    data = encode(picture(size=(640, 480)), format)
    exact, fast = (
        decode(data, DecodeOptions(PREPROCESSOR, LIMIT)),
        decode(data, DecodeOptions(PREPROCESSOR, LIMIT, fast=True)),
    )
    assert np.array_equal(exact.pixels, fast.pixels) == (format != "JPEG")  # type: ignore[arg-type]


def test_fast_decoding_keeps_the_error_of_a_broken_jpeg() -> None:
    data = encode(picture(size=(640, 480)), "JPEG")[:-2000]
    assert decode(data, DecodeOptions(PREPROCESSOR, LIMIT, fast=True)) == decode(
        data, DecodeOptions(PREPROCESSOR, LIMIT)
    )


def test_first_picture_of_a_multi_picture_file_is_decoded() -> None:
    data = encode(picture(), "MPO", save_all=True, append_images=[picture().rotate(180)])
    assert_decodes_to(data, load_with_transformers(data))


# --- EXIF ------------------------------------------------------------------------------------------


def exif(orientation: object) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_in_pillow(orientation: int, format: str) -> None:
    data = encode(picture(), format, exif=exif(orientation))
    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
    assert expected.size == ((40, 56) if orientation >= 5 else (56, 40))
    assert_decodes_to(data, expected.convert("RGB"))


@pytest.mark.parametrize("mode", ["P", "LA", "I;16"])
def test_image_that_is_not_rgb_is_turned_upright(mode: str) -> None:
    image = Image.fromarray(GRAY16) if mode == "I;16" else picture(mode)
    data = encode(image, "PNG", exif=exif(6))
    upright = decoded(encode(image.transpose(Image.Transpose.ROTATE_270), "PNG"))
    turned = decoded(data)
    assert (turned.width, turned.height) == (40, 56)
    np.testing.assert_array_equal(turned.pixels, upright.pixels)


def test_orientation_after_the_pixels_of_a_png_is_applied() -> None:
    data = encode(picture(), "PNG", exif=exif(6))
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert moved.index(b"eXIf") > moved.index(b"IDAT")
    assert_decodes_to(moved, load_with_transformers(moved))
    assert decoded(moved).width == 40


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientation_is_ignored(orientation: int) -> None:
    assert_decodes_to(encode(picture(), "PNG", exif=exif(orientation)), picture())


@pytest.mark.parametrize(
    "damaged",
    [
        b"Exif\0\0",
        b"Exif\0\0not a TIFF",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12",
        exif(6).tobytes()[:-9],
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x07\0\xff\0\0\0\0\0\0\x7f\0\0\0\0",
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_is_ignored(damaged: bytes, format: str) -> None:
    result = decoded(encode(picture(), format, exif=damaged))
    np.testing.assert_array_equal(result.pixels, decoded(encode(picture(), format)).pixels)


# --- limits ----------------------------------------------------------------------------------------


def too_large(size: str, limit: int) -> str:
    return (
        f"dimensions too large: {size} pixels, more than the limit of {limit} pixels (input.max_image_pixels)"
    )


def test_image_at_the_pixel_limit_is_decoded_and_one_above_is_an_error() -> None:
    data = encode(picture(), "PNG")
    assert decoded(data, 56 * 40).error is None
    result = decoded(data, 56 * 40 - 1)
    assert result == (None, 56, 40, too_large("56 x 40", 2239))


def claim(format: str, width: int, height: int) -> bytes:
    """A small file whose header has this size."""
    if format == "PNG":
        return png(width, height, 8, 2, b"")
    data = bytearray(encode(picture(), format))
    if format == "JPEG":
        struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    elif format == "GIF":
        struct.pack_into("<HH", data, 6, width, height)
    elif format == "BMP":
        struct.pack_into("<ii", data, 18, width, height)
    elif format == "TIFF":
        return with_tiff_tags(bytes(data), {256: width, 257: height})
    return bytes(data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
def test_decompression_bomb_is_detected_in_the_header(format: str) -> None:
    data = claim(format, 60000, 60000)
    assert len(data) < 10_000
    result = decoded(data, 200_000_000)
    assert result == (None, 60000, 60000, too_large("60000 x 60000", 200_000_000))


def animated_webp(width: int, height: int) -> bytes:
    data = bytearray(encode(picture(), "WEBP", save_all=True, append_images=[picture().rotate(90)]))
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    data[24:30] = canvas
    return bytes(data)


def test_webp_with_a_huge_canvas_is_an_error() -> None:
    result = decoded(animated_webp(12000, 12000), 100_000_000)
    assert result == (None, 12000, 12000, too_large("12000 x 12000", 100_000_000))


@pytest.mark.parametrize("name", ["WebP", "GIF", "TIFF"])
def test_limit_of_pillow_is_an_error_of_the_same_category(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    data = encode(picture(), name)
    if name == "GIF":  # the frame exceeds the canvas
        data = data[:6] + struct.pack("<HH", 1, 1) + data[10:]
    assert decoded(data).error.startswith("dimensions too large: ")


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IiiIiihhIIIIII", 54, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("size", [(-5, 5), (5, -(2**31)), (-(2**31), 1)])
def test_bmp_with_a_negative_size_is_an_error(size: tuple[int, int]) -> None:
    expected = Decoded(None, None, None, "cannot decode: BMP: negative width or height")
    assert decoded(bmp(*size)) == expected


@pytest.mark.parametrize("size", [(2**31, 1), (1, 2**32 - 1)])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_side_that_exceeds_its_column_is_an_error_of_the_image(format: str, size: tuple[int, int]) -> None:
    result = decode_images([claim(format, *size), encode(picture(), "PNG")])
    assert result["error"][0].startswith(f"dimensions too large: {size[0]} x {size[1]} pixels, ")
    assert result["width"] == [None, 56]
    assert result["height"] == [None, 40]


@pytest.mark.parametrize("format", ["BMP", "PNG", "TIFF", "GIF", "WEBP"])
def test_changed_header_never_ends_a_chunk(format: str) -> None:
    chance = random.Random(format)
    images = [bytearray(encode(picture(size=(7, 5)), format)) for _ in range(100)]
    for image in images:
        for _ in range(chance.choice([1, 2, 6])):
            image[chance.randrange(4, min(len(image), 64))] = chance.choice([0, 1, 127, 128, 255])
    assert len(decode_images([*map(bytes, images)])["error"]) == len(images)


def test_limit_above_the_limit_of_pillow_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    data = encode(picture(), "PNG")
    with pytest.raises(PIL.Image.DecompressionBombError):
        PIL.Image.open(io.BytesIO(data))
    assert decoded(data).error is None


@pytest.mark.parametrize("size", [32, 384])
@pytest.mark.parametrize("upright", [True, False])
def test_longest_allowed_side_is_decoded_and_a_longer_one_is_an_error(size: int, upright: bool) -> None:
    preprocessor = Preprocessor.from_dict({"size": size}, "test")
    for length, error in ((MAX_SIDE, None), (MAX_SIDE + 1, f", with a side longer than {MAX_SIDE} pixels")):
        width, height = (1, length) if upright else (length, 1)
        rows = b"\0\x80" * length if upright else b"\0" + b"\x80" * (length // 8 + 1)
        result = decode(png(width, height, 1, 0, rows), DecodeOptions(preprocessor, 2 * MAX_SIDE))
        assert (result.width, result.height) == (width, height)
        assert (result.error or "").endswith(error or "")
        assert (result.pixels is None) == (error is not None)


def text_bomb() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 2_000_000, zip=True)
    return encode(picture(), "PNG", pnginfo=text)


def profile_bomb() -> bytes:
    return encode(picture(), "PNG", icc_profile=b"\0" * 50_000_000)


@pytest.mark.parametrize("make", [text_bomb, profile_bomb])
def test_image_with_large_metadata_is_decoded(make: Callable[[], bytes]) -> None:
    assert_decodes_to(make(), picture())


@pytest.mark.parametrize("metadata", ["exif", "xmp"])
def test_orientation_is_read_next_to_large_metadata(metadata: str) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 2_000_000, zip=True)
    if metadata == "xmp":
        text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    options = {"exif": exif(6)} if metadata == "exif" else {}
    result = decoded(encode(picture(), "PNG", pnginfo=text, **options))
    assert (result.width, result.height, result.error) == (40, 56, None)


def test_error_of_a_broken_image_does_not_depend_on_its_metadata() -> None:
    assert "PNG: image file is truncated" in (decoded(text_bomb()[:-60]).error or "")


def test_tiff_field_that_exceeds_the_file_is_ignored() -> None:
    data = encode(picture(), "TIFF", tiffinfo={65000: 7})
    field = data.index(struct.pack("<HHI", 65000, 3, 1))
    assert_decodes_to(data[: field + 4] + struct.pack("<I", 2**31) + data[field + 8 :], picture())


def test_number_of_tiff_fields_is_limited() -> None:
    data = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**40) + bytes(20 << 18)
    assert "TIFF: more than 262144 segments" in (decoded(data).error or "")


def test_jpeg_without_a_readable_header_gets_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data = claim("JPEG", 60000, 60000)
    monkeypatch.setattr(JpegImageFile, "load_prepare", lambda file: pytest.fail(f"decodes {file.size}"))
    # Two appended bytes would complete this header.
    decoded(data[: data.index(b"\xff\xda")] + b"\xff\xda\0\x04\x03")


# --- bad images -----------------------------------------------------------------------------------


def test_empty_image_is_an_error() -> None:
    assert decoded(b"") == (None, None, None, "empty image: the file has no bytes")


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html>",
        b"%PDF-1.7\n",
        b"\0" * 100,
        b"\x80\x04\x95pickle",
        b"RIFF\x10\0\0\0WAVEfmt ",
        encode(picture(), "PPM"),
        encode(picture(), "ICO"),
    ],
)
def test_error_of_an_unknown_format_has_the_first_bytes(data: bytes) -> None:
    formats = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIF, JPEG XL"
    assert decoded(data) == (
        None,
        None,
        None,
        f"unsupported format: the file starts with {data[:12]!r}; supported formats are {formats}",
    )


SAMPLES = {
    "JPEG": encode(picture(), "JPEG"),
    "JPEG progressive": encode(picture(), "JPEG", progressive=True, exif=exif(6)),
    "PNG": encode(picture(), "PNG"),
    "PNG palette": encode(picture("P"), "PNG", transparency=3),
    "PNG animated": encode(picture(), "PNG", save_all=True, append_images=[picture().rotate(90)]),
    "WebP": encode(picture(), "WEBP"),
    "WebP lossless": encode(picture("RGBA"), "WEBP", lossless=True),
    "WebP animated": encode(picture(), "WEBP", save_all=True, append_images=[picture().rotate(90)]),
    "GIF": encode(picture(), "GIF"),
    "BMP": encode(picture(), "BMP"),
    "TIFF": encode(picture(), "TIFF"),
    "TIFF LZW": encode(picture(), "TIFF", compression="tiff_lzw"),
    "TIFF JPEG": encode(picture(), "TIFF", compression="jpeg"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_truncated_image_is_an_error(name: str) -> None:
    data = SAMPLES[name]
    for end in sorted({*range(1, 40), *range(40, len(data) - 1, max(1, len(data) // 200))}):
        result = decoded(data[:end])
        # An animation needs only its first frame.
        if "animated" not in name and end < 0.9 * len(data):
            assert result.error is not None, f"{end} of {len(data)} bytes"


@pytest.mark.parametrize("restarts", [0, 1])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_that_lacks_only_its_end_is_decoded(mode: str, restarts: int) -> None:
    data = encode(picture(mode), "JPEG", restart_marker_blocks=restarts)
    expected = decoded(data)
    for missing in (1, 2):
        np.testing.assert_array_equal(decoded(data[:-missing]).pixels, expected.pixels)
    for missing in range(3, 120):
        result = decoded(data[:-missing])
        # The last byte of the data may be padding.
        assert result.error is not None or (missing == 3 and np.array_equal(result.pixels, expected.pixels))


def test_progressive_jpeg_without_its_end_is_an_error() -> None:
    data = encode(picture(), "JPEG", progressive=True)
    assert "truncated" in (decoded(data[: data.rindex(b"\xff\xda")]).error or "")
    assert "truncated" in (decoded(data[:-2]).error or "")


@pytest.mark.skipif("not os.environ.get('CASES_DIR')")
@pytest.mark.parametrize("path", ["png-metadata/in/*.png", "jpeg-without-eoi/in/*.jpg"])
def test_cases_from_bug_reports_have_their_outcome(path: str) -> None:
    files = sorted(Path(os.environ["CASES_DIR"]).glob(path))
    assert files
    errors = {file.name: decoded(file.read_bytes()).error for file in files}
    assert [name for name, error in errors.items() if error] == ["cut_tail.jpg"] * ("jpeg" in path)


def test_error_keeps_the_size_from_the_header() -> None:
    result = decoded(encode(picture(size=(400, 300)), "JPEG")[:-500])
    assert result[:3] == (None, 400, 300)
    assert "cannot decode: JPEG: image file is truncated" in result.error


def test_errors_contain_no_memory_addresses_or_line_breaks() -> None:
    assert (
        single_line("no <io.BytesIO object at 0x7fd11f2bafc0>\n\tread\0")
        == r"no <io.BytesIO object> read\x00"
    )
    assert len(single_line("long " * 100)) == MAX_LINE_LENGTH


@pytest.mark.parametrize("name", SAMPLES)
def test_damaged_bytes_never_raise_and_give_the_same_error(name: str) -> None:
    chance = random.Random(name)
    for _ in range(150):
        data = bytearray(SAMPLES[name])
        for _ in range(chance.choice([1, 2, 8, 40])):
            # The header causes most failures, so it is changed often.
            data[chance.randrange(min(len(data), chance.choice([64, 400, len(data)])))] = chance.randrange(
                256
            )
        first, second = decoded(bytes(data)), decoded(bytes(data))
        assert first[1:] == second[1:]
        np.testing.assert_array_equal(first.pixels, second.pixels)


@pytest.mark.parametrize(
    ("format", "mode"),
    [("PNG", "L"), ("PNG", "LA"), ("PNG", "RGB"), ("PNG", "RGBA"), ("JPEG", "L"), ("JPEG", "RGB")],
)
def test_usual_image_has_the_outcome_of_pillows_reader(
    format: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = encode(picture(mode, (28, 27)), format)
    assert _decode_directly(format, good, DecodeOptions(PREPROCESSOR, LIMIT)) is not None
    chance = random.Random(format + mode)
    images = [good, good[:-1], good + b"\0", good + b"\xff\xc4" * (1 << 19)]
    images += [
        good[:2] + b"\xff\xe0" + bytes([0, 2 + size]) + b"JFIF\0\1\1"[:size] + good[2:] for size in range(8)
    ]
    for _ in range(150):
        data = bytearray(good)
        start = chance.randrange(chance.choice([64, len(good)]))
        data[start : start + chance.randrange(2)] = chance.randbytes(chance.randrange(3))
        images.append(bytes(data))
    outcomes = [decoded(data) for data in images]
    monkeypatch.setattr("pipeline.decode.cpu._decode_directly", lambda *_: None)
    for data, outcome in zip(images, outcomes, strict=True):
        expected = decoded(data)
        assert outcome[1:] == expected[1:]
        np.testing.assert_array_equal(outcome.pixels, expected.pixels)


@pytest.mark.parametrize("name", SAMPLES)
def test_random_bytes_after_a_valid_start_never_raise(name: str) -> None:
    chance = random.Random(name)
    for length in range(0, 300, 3):
        decoded(SAMPLES[name][: chance.choice([4, 12, 30])] + chance.randbytes(length))


def test_another_process_gives_the_same_errors_and_prints_nothing() -> None:
    bad = [data[: len(data) // 2] for name, data in SAMPLES.items() if name != "TIFF JPEG"]
    bad += [b"", b"\0\xff", text_bomb(), animated_webp(60000, 60000)]
    bad += [encode(picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12")]
    bad += [palette_with_many_alphas()]
    program = (
        "import sys; from cvt.preprocessing import Preprocessor\n"
        "from pipeline.decode import DecodeOptions, decode, hide_pillow_warnings\n"
        "options = DecodeOptions(Preprocessor.from_dict({'size': 32}, ''), 10**6)\n"
        "hide_pillow_warnings()\n"
        "for line in sys.stdin:\n"
        "    print(decode(bytes.fromhex(line), options)[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="\n".join(data.hex() for data in bad) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [str(decoded(data)[1:]) for data in bad]
    assert done.stderr == ""


def test_decoding_does_not_hide_warnings_of_other_code() -> None:
    program = (
        "import warnings; from pipeline.decode import DecodeOptions, decode, isolated\n"
        "decode(b'BM', DecodeOptions(None, 1)); assert 'PIL' not in str(warnings.filters)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- chunks ----------------------------------------------------------------------------------------


def test_chunk_keeps_its_order_and_its_errors() -> None:
    good = [encode(picture(size=size), "PNG") for size in ((56, 40), (40, 40))]
    samples = pa.table(
        {
            "key": ["a", "b", "c", "d"],
            "target": pa.array([1, 2, None, 4], pa.int32()),
            "error": pa.array([None, None, "no image", None], pa.string()),
            "image": pa.array([good[0], b"\0", None, good[1]], pa.large_binary()),
        }
    )
    chunk = decode_chunk(
        Chunk(shard=3, start=10, samples=samples, total=14), DecodeOptions(PREPROCESSOR, LIMIT)
    )
    assert (chunk.shard, chunk.start, chunk.total) == (3, 10, 14)
    assert chunk.pixels is not None
    np.testing.assert_array_equal(chunk.pixels, [decoded(data).pixels for data in good])
    result = chunk.samples.to_pydict()
    assert "image" not in result
    assert result["key"] == ["a", "b", "c", "d"]
    assert result["target"] == [1, 2, None, 4]
    assert result["width"] == [56, None, None, 40]
    assert result["height"] == [40, None, None, 40]
    assert result["error"] == [None, decoded(b"\0").error, "no image", None]


def decode_images(images: list[bytes]) -> dict[str, list[object]]:
    """The columns of a chunk after decoding."""
    samples = pa.table(
        {
            "error": pa.nulls(len(images), pa.string()),
            "image": pa.array(images, pa.large_binary()),
        }
    )
    return decode_chunk(Chunk(0, 0, samples), DecodeOptions(PREPROCESSOR, LIMIT)).samples.to_pydict()


def test_chunk_without_valid_images_has_no_pixels() -> None:
    samples = pa.table(
        {
            "key": ["a"],
            "target": pa.array([1], pa.int32()),
            "error": pa.array([None], pa.string()),
            "image": pa.array([b"\0"], pa.large_binary()),
        }
    )
    chunk = decode_chunk(Chunk(shard=0, start=0, samples=samples), DecodeOptions(PREPROCESSOR, LIMIT))
    assert chunk.pixels is not None
    assert chunk.pixels.shape == (0, 32, 32, 3)


def test_slow_images_of_a_chunk_share_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts: list[float] = []
    now = 0.0
    monkeypatch.setattr("pipeline.decode.cpu.monotonic", lambda: now)

    def decode_image(data: bytes, options: DecodeOptions) -> Decoded:
        nonlocal now
        timeout_s = options.timeout_s
        timeouts.append(timeout_s)
        now += timeout_s if data == b"slow" else 0.001
        detail = DecodeDeadline(timeout_s).message if data == b"slow" else "broken"
        return Decoded(None, None, None, sample_error(ErrorCategory.CANNOT_DECODE, detail))

    images = [b"slow", b"other"] * 20
    samples = pa.table(
        {
            "key": [str(number) for number in range(40)],
            "target": pa.nulls(40, pa.int32()),
            "error": pa.nulls(40, pa.string()),
            "image": pa.array(images, pa.large_binary()),
        }
    )
    decode_chunk(Chunk(0, 0, samples), DecodeOptions(PREPROCESSOR, LIMIT), decode_image)
    # The limits do not depend on the exact time of the images before, because errors name them.
    assert timeouts == [60] * 7 + [300 / 40] * 33
    assert now < 600
