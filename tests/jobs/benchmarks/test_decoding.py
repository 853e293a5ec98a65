"""Tests of the decoding benchmark: measured decoders and reported differences."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cvt.preprocessing import Preprocessor
from jobs.benchmarks.decoding import (
    EXACT,
    TRANSFORMERS,
    available_decoders,
    compare_decoders,
    decode_on_cpu,
    decode_on_gpu,
    decoding,
    to_pixels,
)
from jobs.benchmarks.figures import BenchmarkError
from jobs.reference import load_model, read_images
from pipeline.decode import DecodeOptions
from pipeline.decode.gpu import GpuDecoder
from tests.command import invoke
from tests.makers import make_image

SAMPLES = Path(__file__).parents[3] / "jobs" / "data" / "fashion-mnist"
PREPROCESSOR = Preprocessor.from_dict({"size": 32}, "test")


@pytest.mark.slow
def test_command_compares_decoders_with_transformers(images: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--model", "fashion-mnist", "--rounds", 1, "--device", "cpu", "--output", figures]
    done = invoke(decoding, "--images", images, *options)
    found = json.loads(figures.read_text())["decoding"]
    names = [EXACT, "decode, fast", TRANSFORMERS]
    assert [one["variant"] for one in found] == names
    assert all(len(one["images_per_s"]) == len(one["speedup"]) == 1 for one in found)
    for one in found:
        if one["variant"] != "decode, fast":
            assert (one["same_label"], one["max_image_difference"]) == (1, 0)
    assert "same label" in done.stdout


def test_different_pixels_are_reported_in_labels_and_gray_levels() -> None:
    checkpoint = load_model("fashion-mnist", None)

    def inverted(images: Sequence[bytes]) -> Sequence[Any]:
        return [255 - pixels for pixels in decode_on_cpu(checkpoint.preprocessor, images)]

    decoders = available_decoders(checkpoint.preprocessor) | {"inverted": inverted}
    images = [data for data, _ in itertools.islice(read_images(str(SAMPLES), checkpoint.preprocessor), 50)]
    found = {one["variant"]: one for one in compare_decoders(images, decoders, checkpoint, "cpu", 1)}
    assert found[EXACT]["same_label"] == found[TRANSFORMERS]["same_label"] == 1
    assert found[TRANSFORMERS]["max_image_difference"] == 0
    assert found["inverted"]["same_label"] < 0.9
    assert found["inverted"]["max_image_difference"] > found["inverted"]["mean_difference"] > 50


def test_decoder_that_loses_an_image_fails() -> None:
    checkpoint = load_model("fashion-mnist", None)

    def lossy(images: Sequence[bytes]) -> Sequence[Any]:
        return decode_on_cpu(checkpoint.preprocessor, images[1:])

    images = [make_image(i) for i in range(3)]
    decoders = available_decoders(checkpoint.preprocessor) | {"lossy": lossy}
    with pytest.raises(BenchmarkError, match="lossy: 2 of 3 images were processed"):
        compare_decoders(images, decoders, checkpoint, "cpu", 1)


def test_images_decoded_on_a_device_keep_their_order() -> None:
    def decode_with_pillow(files: list[bytes]) -> list[Tensor]:
        opened = [np.array(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
        return [torch.from_numpy(image).permute(2, 0, 1) for image in opened]

    decoder = GpuDecoder(DecodeOptions(PREPROCESSOR, 10**6), "cpu", decode_with_pillow)
    images = [make_image(i, (64, 48), "PNG" if i == 2 else "JPEG") for i in range(5)]
    pixels = to_pixels(decode_on_gpu(decoder, images, chunk_images=2), PREPROCESSOR)
    expected = to_pixels(decode_on_cpu(PREPROCESSOR, images), PREPROCESSOR)
    assert pixels.shape == expected.shape == (5, 32, 32, 3)
    assert np.abs(pixels.astype(int) - expected).mean((1, 2, 3)).max() < 2
