"""Images that kill or hang their decoder: only the image is an error."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cvt.preprocessing import Preprocessor
from pipeline.decode import DecodeOptions, decode
from pipeline.decode.isolated import decode_in_child
from tests.makers import make_image
from tests.measuring import measure

GOOD = Preprocessor.from_dict({"size": 32}, "test")


@dataclass(frozen=True)
class DeadlyPreprocessor(Preprocessor):
    """Takes the place of a faulty decoder: the width of the image chooses the fault."""

    short_of_memory: Path | None = None

    def __call__(self, image: Image.Image, *arguments: Any) -> np.ndarray:
        if image.width in (signal.SIGKILL, signal.SIGSEGV):
            os.kill(os.getpid(), image.width)
        if self.short_of_memory is not None and self.short_of_memory.exists():
            self.short_of_memory.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        while image.width == 1:
            pass
        return super().__call__(image, *arguments)


DEADLY = DeadlyPreprocessor(**{field.name: getattr(GOOD, field.name) for field in fields(Preprocessor)})


@pytest.mark.slow
def test_death_of_the_decoder_is_the_error_of_the_image() -> None:
    errors = {}
    for width in (20, 9, 1, 21):
        result = decode_in_child(make_image(1, (width, 20)), DecodeOptions(DEADLY, 10**6, timeout_s=0.1))
        errors[width] = result.error
    assert errors == {
        20: None,
        9: "cannot decode: the decoder was killed by signal 9 (SIGKILL), possibly for lack of memory",
        1: "cannot decode: decoding took more than 0.1 s (decode.timeout_s)",
        21: None,
    }


def test_image_whose_decoder_is_killed_once_is_decoded_again(tmp_path: Path) -> None:
    marker = tmp_path / "short of memory"
    marker.touch()
    result = decode_in_child(make_image(1), DecodeOptions(replace(DEADLY, short_of_memory=marker), 10**6))
    assert not marker.exists()
    assert (result.error, result.pixels is None) == (None, False)


def test_damaged_metadata_prints_no_warnings(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.decode.isolated._own", threading.local())  # a new child
    stream = io.BytesIO()
    Image.new("RGB", (40, 40)).save(stream, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    assert decode_in_child(stream.getvalue(), DecodeOptions(GOOD, 10**6)).error is None
    assert capfd.readouterr().err == ""


def decode_with_missing_interpreter(folder: str) -> None:
    del folder
    sys.executable = "/missing/python"
    decode_in_child(make_image(1), DecodeOptions(GOOD, 10**6))


def decode_with_failing_child(folder: str) -> None:
    sys.path[:] = [folder]  # of another package of this name
    decode_in_child(make_image(1), DecodeOptions(GOOD, 10**6))


@pytest.mark.parametrize("decode", [decode_with_missing_interpreter, decode_with_failing_child])
def test_worker_whose_child_does_not_start_ends(decode: Callable[[str], None], tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise ImportError")
    measured = measure(decode, str(tmp_path))
    assert (measured.exit_code, measured.outcome) == (1, None)


def test_child_decodes_as_the_process_itself_does() -> None:
    for data in (make_image(5, (90, 60)), make_image(5)[:-9], b"no image"):
        ours, theirs = (
            decode(data, DecodeOptions(GOOD, 10**6)),
            decode_in_child(data, DecodeOptions(GOOD, 10**6)),
        )
        assert theirs[1:] == ours[1:]
        np.testing.assert_array_equal(theirs.pixels, ours.pixels)
