"""AVIF, HEIF and JPEG XL: the same results and limits as for the other formats, in a child process."""

from __future__ import annotations

import random
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from imagecodecs import jpegxl_encode, jpegxl_encode_jpeg
from PIL import Image

from cvt.preprocessing import Preprocessor
from pipeline import open_image
from pipeline.decode import DecodeOptions, decode, isolated
from pipeline.decode.bounds import BYTES_PER_PIXEL
from pipeline.decode.plugins import REQUIREMENTS
from pipeline.storage import Storage
from tests.pipeline.decode.test_decoding import (
    GRAY16,
    LIMIT,
    PREPROCESSOR,
    assert_decodes_to,
    decode_images,
    decoded,
    encode,
    exif,
    load_with_transformers,
    picture,
)

pillow_heif.register_heif_opener()
pytestmark = pytest.mark.filterwarnings("ignore")


def jxl(image: Image.Image, **options: object) -> bytes:
    return jpegxl_encode(np.asarray(image), lossless=True, **options)


SAMPLES = {
    "AVIF": encode(picture(), "AVIF"),
    "AVIF alpha": encode(picture("RGBA"), "AVIF"),
    "AVIF animated": encode(picture(), "AVIF", save_all=True, append_images=[picture().rotate(90)]),
    "HEIF": encode(picture(), "HEIF"),
    "HEIF alpha": encode(picture("RGBA"), "HEIF"),
    "HEIF grid": encode(picture(size=(200, 150)), "HEIF", tile_size=64),
    "JPEG XL": jxl(picture()),
    "JPEG XL container": jxl(picture("RGBA"), usecontainer=True),
    "JPEG XL lossy": jpegxl_encode(np.asarray(picture()), distance=1.0),
    "JPEG XL of a JPEG": jpegxl_encode_jpeg(encode(picture(), "JPEG")),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_format_is_decoded_like_its_picture(name: str) -> None:
    data = SAMPLES[name]
    result = decoded(data)
    assert (result.width, result.height, result.error) == ((200, 150) if "grid" in name else (56, 40)) + (
        None,
    )
    reference = PREPROCESSOR(picture(size=(result.width, result.height)))
    assert np.abs(result.pixels.astype(int) - reference).mean() < 4
    if not name.startswith("JPEG XL"):
        assert_decodes_to(data, load_with_transformers(data))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("format", ["AVIF", "HEIF", "JPEG XL"])
def test_every_mode_becomes_rgb_and_drops_transparency(format: str, mode: str) -> None:
    image = picture(mode)
    if format == "JPEG XL":
        assert_decodes_to(jxl(image), image.convert("RGB"))
    else:
        data = encode(image, format)
        assert_decodes_to(data, load_with_transformers(data))


@pytest.mark.parametrize("format", ["AVIF", "HEIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(format: str, orientation: int) -> None:
    data = encode(picture(), format, exif=exif(orientation).tobytes())
    expected = load_with_transformers(data)
    assert expected.size == ((40, 56) if orientation >= 5 else (56, 40))
    assert_decodes_to(data, expected)


def test_orientation_of_jpeg_xl_is_the_one_of_its_header() -> None:
    jpeg = encode(picture(), "JPEG", exif=exif(6), quality=95)
    result, expected = decoded(jpegxl_encode_jpeg(jpeg)), decoded(jpeg)
    assert (result.width, result.height) == (40, 56)
    assert np.abs(result.pixels.astype(int) - expected.pixels).mean() < 2


def test_16_bit_heif_is_scaled_not_clipped() -> None:
    result = decoded(encode(Image.fromarray(GRAY16), "HEIF", quality=-1))
    expected = PREPROCESSOR(Image.fromarray((GRAY16 >> 8).astype(np.uint8)).convert("RGB"))
    assert np.abs(result.pixels.astype(int) - expected).mean() < 2


@pytest.mark.parametrize(("bits", "kind"), [(1, np.uint8), (10, np.uint16), (16, np.uint16)])
def test_jpeg_xl_without_8_bits_per_sample_is_an_error(bits: int, kind: type) -> None:
    data = jpegxl_encode((GRAY16 >> 16 - bits).astype(kind), lossless=True, bitspersample=bits)
    assert decoded(data).error == "cannot decode: JPEG XL: not 8 bits per sample; save the image with 8 bits"


def test_first_frame_of_jpeg_xl_is_decoded() -> None:
    frames = np.stack([np.asarray(picture()), np.asarray(picture().rotate(180))])
    assert_decodes_to(jpegxl_encode(frames, lossless=True), picture())


@pytest.mark.parametrize("name", ["AVIF", "HEIF", "JPEG XL"])
def test_image_over_the_limit_is_an_error(name: str) -> None:
    result = decode(SAMPLES[name], DecodeOptions(PREPROCESSOR, 2000))
    assert result[:3] == (None, 56, 40)
    assert result.error is not None
    assert result.error.startswith("dimensions too large: 56 x 40 pixels, more than the limit of 2000")


def test_library_that_is_missing_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.decode.cpu.child_decoders", {})
    for module in ("PIL._avif", "pillow_heif", "imagecodecs"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr("PIL._avif")
    for name, package in REQUIREMENTS.items():
        error = decoded(SAMPLES[name]).error
        assert error is not None
        assert error.startswith(f"unsupported format: {name} needs {package} (pip install '{package}'): ")


def test_content_decides_and_not_the_brand_order() -> None:
    avif = SAMPLES["AVIF"]
    generic = avif[:8] + b"mif1" + avif[12:]  # `avif` is one of the compatible brands
    assert_decodes_to(generic, load_with_transformers(avif))
    video = b"\0\0\0\x18ftypisom\0\0\2\0isomiso2mp41\0\0\0\x08free"
    assert (decoded(video).error or "").startswith("unsupported format: the file starts with")


class HungryPreprocessor(Preprocessor):
    """Takes the place of a decoder that needs as many bytes as the width of the image says, in MiB."""

    def __call__(self, image: Image.Image, *arguments: Any) -> np.ndarray:
        return bytes(image.width << 20) and super().__call__(image, *arguments)


HUNGRY = HungryPreprocessor(
    **{field.name: getattr(PREPROCESSOR, field.name) for field in fields(Preprocessor)}
)


@pytest.mark.skipif("sys.platform != 'linux'")
def test_memory_of_a_child_is_limited() -> None:
    limit = (BYTES_PER_PIXEL * LIMIT >> 20) + (isolated._OTHER_MEMORY >> 20)
    errors = [
        decode(jxl(Image.new("L", (width, 8))), DecodeOptions(HUNGRY, LIMIT)).error
        for width in (limit // 2, limit + 8, 1)
    ]
    assert errors == [None, "cannot decode: JPEG XL: MemoryError", None]


@pytest.mark.parametrize("name", SAMPLES)
def test_truncated_image_is_an_error(name: str) -> None:
    data = SAMPLES[name]
    for end in sorted({1, 4, 11, 13, 30, *range(40, int(0.9 * len(data)), max(1, len(data) // 40))}):
        assert decoded(data[:end]).error is not None or "animated" in name, f"{end} of {len(data)} bytes"


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_mutated_image_never_raises(name: str) -> None:
    chance, data = random.Random(name), SAMPLES[name]
    mutants = []
    for _ in range(100):
        mutant = bytearray(data)
        for _ in range(chance.choice([1, 2, 8])):
            mutant[chance.randrange(4, chance.choice([64, 300, len(data)]) % len(data) + 5)] = (
                chance.randrange(256)
            )
        mutants.append(bytes(mutant))
    assert len(decode_images(mutants)["error"]) == len(mutants)


@pytest.mark.parametrize("name", ["AVIF", "HEIF", "JPEG XL", "JPEG XL container"])
def test_image_of_a_row_is_opened(name: str, tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(SAMPLES[name])
    [info] = Storage().list(str(file))
    row = {"shard": info.uri, "index": 0, "uri": info.uri, "version": info.version, "offset": 0}
    image = open_image(row | {"size": info.size})
    assert (image.format, image.size) == (name.removesuffix(" container"), (56, 40))
    assert image.convert("RGB").size == (56, 40)
