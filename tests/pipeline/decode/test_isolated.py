"""Images that kill or hang their decoder: only the image is an error."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from cvt.preprocessing import Preprocessor
from pipeline.decode import decode
from pipeline.decode.isolated import ChildDecoder
from tests.makers import make_image

GOOD = Preprocessor.from_dict({"size": 32}, "test")


@dataclass(frozen=True)
class DeadlyPreprocessor(Preprocessor):
    """Takes the place of a faulty decoder: the width of the image chooses the fault."""

    def __call__(self, image: Image.Image, *arguments: Any) -> np.ndarray:
        if image.width == signal.SIGKILL:
            os.kill(os.getpid(), signal.SIGKILL)
        while image.width == 1:
            pass
        return super().__call__(image, *arguments)


DEADLY = DeadlyPreprocessor(**{field.name: getattr(GOOD, field.name) for field in fields(Preprocessor)})


def test_death_of_the_decoder_is_the_error_of_the_image() -> None:
    errors = {}
    with ChildDecoder() as child:
        for width in (20, 9, 1, 21):
            result = child(make_image(1, (width, 20)), DEADLY, 10**6, False, 0.1)
            errors[width] = result.error
    assert errors == {
        20: None,
        9: "cannot decode: the decoder was killed by signal 9 (SIGKILL), possibly for lack of memory",
        1: "cannot decode: decoding took more than 0.1 s (decode.timeout_s)",
        21: None,
    }


def test_child_decodes_as_the_process_itself_does() -> None:
    with ChildDecoder() as child:
        for data in (make_image(5, (90, 60)), make_image(5)[:-9], b"no image"):
            ours, theirs = decode(data, GOOD, 10**6), child(data, GOOD, 10**6, False, 60)
            assert theirs[1:] == ours[1:]
            np.testing.assert_array_equal(theirs.pixels, ours.pixels)
