"""Tests of preprocessing against transformers' processor, and of reading preprocessor_config.json."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CvtConfig, CvtForImageClassification
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from cvt import preprocessing
from cvt.errors import CheckpointError
from cvt.preprocessing import SMOOTH_FILTERS, Preprocessor

PUBLISHED = {
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 224,
}


def published(**changes: Any) -> dict[str, Any]:
    """Returns the configuration of microsoft/cvt-13 with changes. None removes a field."""
    return {name: value for name, value in {**PUBLISHED, **changes}.items() if value is not None}


def read(**changes: Any) -> Preprocessor:
    return Preprocessor.from_dict(published(**changes), "folder/preprocessor_config.json")


def transformers_pixels(image: Image.Image, **config: Any) -> np.ndarray:
    """Returns the pixels of transformers' processor before normalization, uint8 (n, n, 3)."""
    processor = ConvNextImageProcessorPil(**{**config, "do_normalize": False, "do_rescale": False})
    pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
    assert pixels.dtype == np.uint8
    return pixels.transpose(1, 2, 0)


def difference(pixels: np.ndarray, expected: np.ndarray) -> float:
    """Returns the mean absolute difference in gray levels."""
    assert pixels.shape == expected.shape
    return float(np.abs(pixels.astype(np.int16) - expected.astype(np.int16)).mean())


def assert_close(pixels: np.ndarray, expected: np.ndarray) -> None:
    """Asserts that few values differ, by rounding alone."""
    assert difference(pixels, expected) < 0.05
    assert np.abs(pixels.astype(np.int16) - expected).max() <= 2


def noise(width: int, height: int) -> Image.Image:
    """Returns a random image, for which errors of resizing are largest."""
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


# --- photographs ----------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Results of this preprocessing and of transformers, one entry per photograph."""

    differences: list[float]
    top1: list[int]
    transformers_top1: list[int]


def small_cvt() -> CvtForImageClassification:
    """Returns a small CvT of transformers with fixed random weights and ten classes."""
    torch.manual_seed(0)
    config = CvtConfig(
        patch_sizes=[16, 3, 3],
        patch_stride=[16, 2, 2],
        patch_padding=[0, 1, 1],
        embed_dim=[16, 32, 48],
        num_heads=[1, 2, 3],
        depth=[1, 2, 3],  # transformers needs more layers than preceding stages
        drop_path_rate=[0.0, 0.0, 0.0],
        initializer_range=0.2,
        num_labels=10,
    )
    return CvtForImageClassification(config).eval()


@pytest.fixture(scope="module", params=[224, 384])
def comparison(request: pytest.FixtureRequest, photographs: list[tuple[str, bytes, int]]) -> Comparison:
    config = published(size=request.param)
    ours = Preprocessor.from_dict(config, "config")
    theirs = ConvNextImageProcessorPil(**config)
    mean, std = np.float32(ours.mean), np.float32(ours.std)
    model = small_cvt()
    differences, logits, transformers_logits = [], [], []
    photographs = photographs[:: 1 if request.param == 224 else 3]  # large images take long
    for start in range(0, len(photographs), 50):
        images = [
            Image.open(io.BytesIO(data)).convert("RGB") for _, data, _ in photographs[start : start + 50]
        ]
        pixels = np.stack([ours(image) for image in images])
        values = (pixels * np.float32(ours.rescale_factor) - mean) / std
        expected = theirs(images=images, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
        levels = np.rint((expected * std + mean) / ours.rescale_factor)
        differences += [difference(a, b) for a, b in zip(pixels, levels, strict=True)]
        with torch.inference_mode():
            for outputs, batch in ((logits, values), (transformers_logits, expected)):
                inputs = torch.from_numpy(batch.transpose(0, 3, 1, 2).astype(np.float32))
                outputs.append(model(inputs).logits)
    # An untrained model gives almost all images the same class. Centering the logits makes classes differ.
    reference = torch.cat(transformers_logits)
    center = reference.mean(0)
    top1 = (torch.cat(logits) - center).argmax(1).tolist()
    return Comparison(differences, top1, (reference - center).argmax(1).tolist())


@pytest.mark.slow
def test_photographs_differ_by_less_than_a_fiftieth_of_a_gray_level(comparison: Comparison) -> None:
    assert max(comparison.differences) < 0.02


@pytest.mark.slow
def test_photographs_have_the_same_top_class_as_with_transformers(comparison: Comparison) -> None:
    classes, counts = np.unique(comparison.transformers_top1, return_counts=True)
    assert len(classes) == 10, "the model does not distinguish the photographs"
    assert counts.max() < len(comparison.top1) / 2
    assert comparison.top1 == comparison.transformers_top1


# --- unusual images --------------------------------------------------------------------------------

SHAPES = [(1, 1), (3, 2), (1, 300), (300, 1), (7, 900), (900, 7), (223, 225), (256, 256), (224, 300)]
SHAPES += [(333, 500), (500, 333), (250, 400), (400, 250), (300, 599), (300, 620), (300, 1500)]
SHAPES += [(1500, 300), (64, 64), (28, 28), (33, 40), (35, 36), (255, 257), (1200, 1201)]


@pytest.mark.parametrize("size", [32, 224, 384, 400])
@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_any_shape_is_close_to_transformers(width: int, height: int, size: int) -> None:
    image = noise(width, height)
    config = published(size=size)
    pixels = Preprocessor.from_dict(config, "config")(image)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert_close(pixels, transformers_pixels(image, **config))


@pytest.mark.parametrize("crop_pct", [0.3, 0.9, 0.95, 1.0])
@pytest.mark.parametrize(("width", "height"), [(334, 500), (500, 334), (36, 40), (90, 400)])
def test_any_crop_is_close_to_transformers(width: int, height: int, crop_pct: float) -> None:
    image = noise(width, height)
    config = published(size=32, crop_pct=crop_pct)
    pixels = Preprocessor.from_dict(config, "config")(image)
    assert_close(pixels, transformers_pixels(image, **config))


@pytest.mark.parametrize("resample", sorted(SMOOTH_FILTERS))
@pytest.mark.parametrize(("width", "height"), [(333, 500), (500, 333), (60, 90)])
def test_any_filter_is_close_to_transformers(width: int, height: int, resample: int) -> None:
    image = noise(width, height)
    config = published(resample=int(resample))
    pixels = Preprocessor.from_dict(config, "config")(image)
    assert_close(pixels, transformers_pixels(image, **config))


@pytest.mark.parametrize("resample", sorted(SMOOTH_FILTERS))
@pytest.mark.parametrize(("width", "height"), [(333, 500), (500, 333), (60, 90), (300, 1500)])
def test_simd_and_pillow_resize_alike(
    width: int, height: int, resample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocessor, image = read(resample=int(resample)), noise(width, height)
    pixels = preprocessor(image)
    monkeypatch.setattr(preprocessing, "_SIMD_FILTERS", {})
    assert_close(pixels, preprocessor(image))


@pytest.mark.parametrize("resample", sorted(SMOOTH_FILTERS))
def test_pixels_do_not_depend_on_the_instructions_of_the_cpu(
    resample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cykooz_resizer = pytest.importorskip("cykooz_resizer")

    def make_plain() -> Any:
        resizer = plain_resizer()
        resizer.cpu_extensions = cykooz_resizer.CpuExtensions.none
        return resizer

    plain_resizer = cykooz_resizer.Resizer
    assert plain_resizer().cpu_extensions != cykooz_resizer.CpuExtensions.none
    preprocessor, image = read(resample=int(resample)), noise(500, 333)
    pixels = preprocessor(image)
    monkeypatch.setattr(cykooz_resizer, "Resizer", make_plain)
    np.testing.assert_array_equal(pixels, preprocessor(image))


@pytest.mark.parametrize("length", [1 << 20, (1 << 20) - 1])
def test_line_of_a_million_pixels_is_cropped_to_its_center(length: int) -> None:
    line = np.zeros((1, length, 3), np.uint8)
    line[:, length // 2 - 2 : length // 2 + 2] = 255
    for image in (Image.fromarray(line), Image.fromarray(line.transpose(1, 0, 2))):
        assert read()(image).min() == 255


@pytest.mark.parametrize("resample", sorted(SMOOTH_FILTERS))
@pytest.mark.parametrize("size", [28, 384])
def test_image_of_the_final_size_stays_as_it_is(size: int, resample: int) -> None:
    image, config = noise(size, size), published(size=size, crop_pct=1.0, resample=int(resample))
    pixels = Preprocessor.from_dict(config, "file")(image)
    np.testing.assert_array_equal(pixels, np.asarray(image))
    np.testing.assert_array_equal(pixels, transformers_pixels(image, **config))
    assert pixels.flags.writeable


def test_image_that_is_not_rgb_fails() -> None:
    with pytest.raises(ValueError, match="must be in mode RGB, not P"):
        read()(Image.new("P", (8, 8)))


# --- content of the file ---------------------------------------------------------------------------


def test_published_file_is_read() -> None:
    assert read() == Preprocessor(
        size=224,
        crop_pct=0.875,
        resample=3,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        rescale_factor=1 / 255,
    )


def test_missing_fields_have_the_defaults_of_transformers() -> None:
    default = ConvNextImageProcessorPil()
    assert Preprocessor.from_dict({}, "config") == Preprocessor(
        size=default.size["shortest_edge"],
        crop_pct=default.crop_pct,
        resample=int(default.resample),
        mean=tuple(default.image_mean),
        std=tuple(default.image_std),
        rescale_factor=default.rescale_factor,
    )


def test_nulls_that_transformers_writes_are_accepted() -> None:
    nulls = ["image_processor_type", "do_center_crop", "crop_size", "default_to_square", "do_pad", "device"]
    assert Preprocessor.from_dict({**PUBLISHED, **dict.fromkeys(nulls)}, "config") == read()


@pytest.mark.parametrize(
    "field", ["do_resize", "size", "crop_pct", "resample", "do_normalize", "image_mean", "do_rescale"]
)
def test_other_nulls_fail(field: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{field}(\[0\])?: .*null"):
        Preprocessor.from_dict({**PUBLISHED, field: None}, "config")


@pytest.mark.parametrize("field", ["image_processor_type", "feature_extractor_type"])
@pytest.mark.parametrize(
    "name",
    [
        "ConvNextImageProcessor",
        "ConvNextImageProcessorFast",
        "ConvNextImageProcessorPil",
        "ConvNextFeatureExtractor",
    ],
)
def test_every_name_of_the_processor_is_accepted(field: str, name: str) -> None:
    assert read(feature_extractor_type=None) == read(**{"feature_extractor_type": None, field: name})


def test_size_may_be_given_as_shortest_edge() -> None:
    assert read(size={"shortest_edge": 384}) == read(size=384)


def test_single_mean_applies_to_all_channels() -> None:
    assert read(image_mean=0.5, image_std=1).mean == (0.5, 0.5, 0.5)
    assert read(image_mean=0.5, image_std=1).std == (1.0, 1.0, 1.0)


def test_disabled_normalization_and_rescaling_keep_values() -> None:
    plain = read(do_normalize=False, do_rescale=False)
    assert (plain.mean, plain.std, plain.rescale_factor) == ((0, 0, 0), (1, 1, 1), 1)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("image_processor_type", {"image_processor_type": "ViTImageProcessor"}),
        ("image_processor_type", {"image_processor_type": ["ConvNextImageProcessor"]}),
        ("feature_extractor_type", {"feature_extractor_type": "CLIPFeatureExtractor"}),
        ("do_resize", {"do_resize": False}),
        ("do_resize", {"do_resize": "yes"}),
        ("do_normalize", {"do_normalize": 1}),
        ("do_rescale", {"do_rescale": "false"}),
        ("do_center_crop", {"do_center_crop": 1}),
        ("do_center_crop", {"do_center_crop": True, "crop_size": 224}),
        ("size", {"size": {"height": 224, "width": 224}}),
        ("size", {"size": {"shortest_edge": 224, "longest_edge": 500}}),
        ("size", {"size": {"shortest_edge": None}}),
        ("size", {"size": [224, 224]}),
        ("size", {"size": 0}),
        ("size", {"size": -224}),
        ("size", {"size": 224.5}),
        ("size", {"size": "224"}),
        ("size", {"size": True}),
        ("default_to_square", {"default_to_square": True}),
        ("crop_pct", {"crop_pct": 0}),
        ("crop_pct", {"crop_pct": 1.01}),
        ("crop_pct", {"crop_pct": "0.875"}),
        ("crop_pct", {"crop_pct": float("nan")}),
        ("resample", {"resample": 99}),
        ("resample", {"resample": -1}),
        ("resample", {"resample": int(Image.Resampling.NEAREST)}),
        ("resample", {"resample": int(Image.Resampling.BOX)}),
        ("resample", {"resample": "bicubic"}),
        ("resample", {"resample": 3.0}),
        ("resample", {"resample": True}),
        ("rescale_factor", {"rescale_factor": 0}),
        ("rescale_factor", {"rescale_factor": float("inf")}),
        ("image_mean", {"image_mean": [0.5, 0.5]}),
        ("image_mean", {"image_mean": [0.5, 0.5, None]}),
        ("image_mean", {"image_mean": "imagenet"}),
        ("image_std", {"image_std": [0.2, 0.0, 0.2]}),
        ("image_std", {"image_std": 0}),
        ("image_std", {"image_std": [-0.2, 0.2, 0.2]}),
        ("image_std", {"image_std": [0.2, 0.2, 0.2, 0.2]}),
    ],
)
def test_unsupported_value_fails_with_file_and_field(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(
        CheckpointError, match=rf"^folder/preprocessor_config.json: {field}(\[\d\])?: "
    ) as caught:
        read(**changes)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("changes", [{}, {"size": 384}, {"do_normalize": False, "do_rescale": False}])
def test_written_file_is_equal_here_and_in_transformers(changes: dict[str, Any]) -> None:
    preprocessor = read(**changes)
    written = json.loads(json.dumps(preprocessor.to_dict()))
    assert Preprocessor.from_dict(written, "written") == preprocessor
    image = noise(300, 400)
    expected = ConvNextImageProcessorPil(**published(**changes))(images=image, return_tensors="np")
    actual = ConvNextImageProcessorPil.from_dict(written)(images=image, return_tensors="np")
    np.testing.assert_allclose(actual["pixel_values"], expected["pixel_values"], atol=1e-6)


def test_preprocessor_can_be_pickled_and_hashed() -> None:
    preprocessor = read()
    assert {preprocessor: 1}[pickle.loads(pickle.dumps(preprocessor))] == 1
    assert len(pickle.dumps(preprocessor)) < 500


# --- location of the file --------------------------------------------------------------------------


def test_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    assert Preprocessor.from_folder(tmp_path) == read()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        (b"", "as JSON"),
        (b'{"size": 224,', "as JSON.*line 1"),
        (b"\xff\xfe\xfd", "as JSON"),
        (b"[224]", "not a JSON object"),
        (b'{"size": "large"}', "size: "),
    ],
)
def test_missing_or_invalid_file_is_named(tmp_path: Path, content: bytes | None, problem: str) -> None:
    file = tmp_path / "preprocessor_config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=problem) as caught:
        Preprocessor.from_folder(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")
