"""What a hostile input can cost: outcome, peak memory and time, measured in a child process.

Each test is a row of docs/reference/hostile-inputs.md. Keep each test under two seconds.
"""

from __future__ import annotations

import io

import pytest
from PIL import Image

from cvt.preprocessing import Preprocessor
from pipeline.decode import decode
from tests.measuring import measure

MIB = 1024**2

PREPROCESSOR = Preprocessor.from_dict({"size": 32}, "test")


# --- images ----------------------------------------------------------------------------------------


def decode_image(data: bytes, max_pixels: int = 178_956_970) -> str | None:
    """Decodes an image as the stage does; returns its error."""
    return decode(data, PREPROCESSOR, max_pixels).error


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.skipif("sys.platform != 'linux'")
def test_image_over_the_pixel_limit_is_not_decoded() -> None:
    measured = measure(decode_image, encoded(Image.new("1", (40_000, 20_000)), "PNG"))
    assert "dimensions too large: 40000 x 20000 pixels" in measured.outcome
    assert measured.peak < 4 * MIB
    assert measured.seconds < 0.5
