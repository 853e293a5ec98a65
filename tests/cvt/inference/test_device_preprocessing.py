"""Tests of preprocessing on a torch device against Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cvt.inference.device_preprocessing import DevicePreprocessor
from cvt.preprocessing import Preprocessor

SHAPES = [(1, 1), (3, 2), (7, 90), (90, 7), (223, 225), (256, 256), (333, 500), (500, 333), (300, 620)]
SHAPES += [(64, 64), (28, 28), (35, 36), (1200, 1201), (1500, 100)]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def preprocessor(size: int = 224, crop_pct: float = 0.875, resample: int = 3) -> Preprocessor:
    return Preprocessor.from_dict({"size": size, "crop_pct": crop_pct, "resample": int(resample)}, "config")


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Returns a synthetic photograph: coarse and fine structure, hard edges, and some noise."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height), 3)
    pixels = np.asarray(image).astype(np.float32)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels += 40 * np.sin(x / 3 + y / 5)[..., None]
    pixels[(x // 17 + y // 23) % 3 == 0] *= 0.4
    pixels += rng.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def tensor(image: Image.Image, device: str = "cpu") -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device)


def difference(pixels: Tensor, image: Image.Image, pillow: Preprocessor) -> float:
    """Returns the mean absolute difference from Pillow, in gray levels."""
    return float(np.abs(pixels.cpu().numpy().astype(np.int16) - pillow(image)).mean())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [32, 224, 384])
def test_images_of_any_shape_are_close_to_pillow(size: int, device: str) -> None:
    preprocess = DevicePreprocessor(preprocessor(size))
    for image in (scene(*shape) for shape in SHAPES):
        pixels = preprocess(tensor(image, device))
        assert pixels.shape == (size, size, 3)
        assert pixels.dtype == torch.uint8
        assert pixels.device.type == device
        assert difference(pixels, image, preprocessor(size)) < 0.4, image.size


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("crop_pct", [0.3, 0.9, 1.0])
def test_any_crop_and_filter_is_close_to_pillow(crop_pct: float, resample: int) -> None:
    pillow = preprocessor(32, crop_pct, resample)
    for shape in [(334, 500), (500, 334), (36, 41), (20, 30)]:
        image = scene(*shape)
        assert difference(DevicePreprocessor(pillow)(tensor(image)), image, pillow) < 0.4


def test_overshooting_values_are_clipped() -> None:
    edge = np.zeros((40, 40, 3), np.uint8)
    edge[:, 20:] = 255
    image = Image.fromarray(edge)
    pixels = DevicePreprocessor(preprocessor())(tensor(image))
    assert np.abs(pixels.numpy().astype(np.int16) - preprocessor()(image)).max() <= 1


@pytest.mark.parametrize("resample", [Image.Resampling.LANCZOS, Image.Resampling.HAMMING])
def test_unsupported_filter_is_named(resample: int) -> None:
    with pytest.raises(
        ValueError, match=rf"resample: {int(resample)} is not supported .* 3 \(bicubic\) and 2 \(bilinear\)"
    ):
        DevicePreprocessor(preprocessor(resample=resample))


@pytest.mark.parametrize("size", [224, 384])
def test_photographs_are_close_to_pillow(photographs: list[tuple[str, bytes, int]], size: int) -> None:
    pillow = preprocessor(size)
    for _, data, _ in photographs[::10]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        assert difference(DevicePreprocessor(pillow)(tensor(image)), image, pillow) < 0.4
