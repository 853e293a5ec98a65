"""Decoding against transformers' processor: what is measured, and that differences are found."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cvt.preprocessing import Preprocessor
from jobs.benchmarks.decoding import (
    EXACT,
    THEIRS,
    available_decoders,
    by_gpu,
    by_this_package,
    compare_decoders,
    decoding,
    to_pixels,
)
from jobs.benchmarks.figures import BenchmarkError
from jobs.reference import load_model, read_images
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
    names = [EXACT, "decode, fast", THEIRS]
    assert [one["decoder"] for one in found] == names
    assert all(len(one["images_per_s"]) == len(one["to_transformers"]) == 1 for one in found)
    for one in found:
        if one["decoder"] != "decode, fast":
            assert (one["same_label"], one["worst_image"]) == (1, 0)
    assert "same label" in done.stdout


def test_other_pixels_show_in_labels_and_gray_levels() -> None:
    checkpoint = load_model("fashion-mnist", None)

    def inverted(images: Iterable[bytes]) -> Iterator[np.ndarray]:
        return (255 - pixels for pixels in by_this_package(checkpoint.preprocessor, images))

    decoders = available_decoders(checkpoint.preprocessor) | {"inverted": inverted}
    images = [data for data, _ in itertools.islice(read_images(str(SAMPLES), checkpoint.preprocessor), 50)]
    found = {one.decoder: one for one in compare_decoders(images, decoders, checkpoint, "cpu", 1)}
    assert found[EXACT].same_label == found[THEIRS].same_label == 1
    assert found[THEIRS].worst_image == 0
    assert found["inverted"].same_label < 0.9
    assert found["inverted"].worst_image > found["inverted"].gray_levels_off > 50


def test_decoder_that_loses_an_image_is_refused() -> None:
    checkpoint = load_model("fashion-mnist", None)

    def lossy(images: Iterable[bytes]) -> Iterator[np.ndarray]:
        return by_this_package(checkpoint.preprocessor, [*images][1:])

    images = [make_image(i) for i in range(3)]
    decoders = available_decoders(checkpoint.preprocessor) | {"lossy": lossy}
    with pytest.raises(BenchmarkError, match="lossy: 2 images came out of 3"):
        compare_decoders(images, decoders, checkpoint, "cpu", 1)


def test_images_decoded_on_a_device_keep_their_order() -> None:
    def by_pillow(files: list[bytes]) -> list[Tensor]:
        opened = [np.array(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
        return [torch.from_numpy(image).permute(2, 0, 1) for image in opened]

    decoder = GpuDecoder(PREPROCESSOR, 10**6, "cpu", by_pillow)
    images = [make_image(i, (64, 48), "PNG" if i == 2 else "JPEG") for i in range(5)]
    found = to_pixels(by_gpu(decoder, images, chunk_images=2), PREPROCESSOR)
    wanted = to_pixels(by_this_package(PREPROCESSOR, images), PREPROCESSOR)
    assert found.shape == wanted.shape == (5, 32, 32, 3)
    assert np.abs(found.astype(int) - wanted).mean((1, 2, 3)).max() < 2
