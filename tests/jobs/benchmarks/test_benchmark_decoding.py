"""Decoding against transformers' processor: what is measured of each way, and that differences are found."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cvt.preprocessing import Preprocessor
from jobs.benchmarks import decoding as benchmark_decoding
from jobs.benchmarks.contenders import WrongCountError
from jobs.benchmarks.data import load_subject
from jobs.benchmarks.decoding import (
    EXACT,
    LARGE,
    THEIRS,
    Way,
    by_gpu,
    compare_decoding,
    decoders,
    enlarged,
    grey_levels,
    take_images,
)
from pipeline.decode.gpu import GpuDecoder
from tests.jobs.test_cli import cvt_label
from tests.makers import make_image

SAMPLES = Path(__file__).parents[3] / "jobs" / "data" / "fashion-mnist"
PREPROCESSOR = Preprocessor.from_dict({"size": 32}, "test")


@pytest.mark.parametrize("size", [(32, 24), (1500, 1000), (2000, 1500)])
def test_images_are_enlarged_by_a_whole_factor(size: tuple[int, int]) -> None:
    data = make_image(size=size)
    width, height = Image.open(io.BytesIO(enlarged(data))).size
    assert width * height >= LARGE
    assert (width % size[0], height % size[1]) == (0, 0)
    assert (enlarged(data) == data) == (size == (2000, 1500))


@pytest.mark.slow
def test_decoding_alone_is_compared_with_transformers(images: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = cvt_label("benchmark", "--images", images, "--decode-only", "--rounds", 1, "--output", figures)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())["decoding"]
    ways = [EXACT, "decode, fast", THEIRS]
    assert [one["way"] for one in found] == ways * 2
    assert [one["count"] for one in found] == [5] * 2 * len(ways)
    assert all(len(one["rates"]) == len(one["ratios"]) == 1 for one in found)
    for one in found:
        if one["way"] != "decode, fast":
            assert (one["same_label"], one["worst_difference"]) == (1, 0)
    assert "same label" in done.stdout


def test_grey_levels_are_of_all_images_and_of_the_worst() -> None:
    exact = np.full((2, 4, 4, 3), 200, np.uint8)
    found = exact.copy()
    found[1] -= 10
    found[1, 0] += 20  # above and below count alike
    assert grey_levels(found, exact) == (5, 10)


def test_other_pixels_are_told_by_labels_and_grey_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = load_subject("fashion-mnist", None)
    ways = decoders(subject.preprocessor, print)
    inverted = Way(ways[EXACT].run, lambda pixels: 255 - pixels)
    monkeypatch.setattr(benchmark_decoding, "decoders", lambda *_: ways | {"inverted": inverted})
    monkeypatch.setattr(benchmark_decoding, "LARGE", 3000)
    images = take_images(str(SAMPLES), subject.preprocessor, 50)
    found = {(one.way, one.count): one for one in compare_decoding(images, subject, "cpu", 1, print)}
    assert found[EXACT, 50].same_label == found[THEIRS, 50].same_label == 1
    assert found[THEIRS, 50].worst_difference == 0
    assert found["inverted", 50].same_label < 0.9
    assert found["inverted", 50].worst_difference > 50


def test_a_way_that_loses_an_image_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = load_subject("fashion-mnist", None)
    ways = decoders(subject.preprocessor, print)

    def lossy(images: Iterable[bytes]) -> Iterator[np.ndarray]:
        return ways[EXACT].run([*images][1:])

    monkeypatch.setattr(benchmark_decoding, "decoders", lambda *_: ways | {"lossy": Way(lossy, np.asarray)})
    monkeypatch.setattr(benchmark_decoding, "LARGE", 3000)
    with pytest.raises(WrongCountError, match="lossy: 2 images came out of 3"):
        compare_decoding([make_image(i) for i in range(3)], subject, "cpu", 1, print)


def test_what_a_device_decodes_is_compared_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_pillow(files: list[bytes]) -> list[Tensor]:
        opened = [np.array(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
        return [torch.from_numpy(image).permute(2, 0, 1) for image in opened]

    monkeypatch.setattr(benchmark_decoding, "_GPU_CHUNK_IMAGES", 2)
    way = by_gpu(GpuDecoder(PREPROCESSOR, 10**6, "cpu", by_pillow))
    images = [make_image(i, (64, 48), "PNG" if i == 2 else "JPEG") for i in range(5)]
    found = np.stack([way.pixels(one) for one in way.run(images)])
    exact = decoders(PREPROCESSOR, print)[EXACT]
    wanted = np.stack([exact.pixels(one) for one in exact.run(images)])
    assert found.shape == wanted.shape == (5, 32, 32, 3)
    assert grey_levels(found, wanted)[1] < 2
