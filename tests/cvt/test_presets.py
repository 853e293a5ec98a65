"""The published variants, against the figures of arXiv 2103.15808 and of Microsoft's model zoo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from cvt.configuration import CvtConfig
from cvt.counting import count_macs
from cvt.modeling import CvtForImageClassification
from cvt.preprocessing import Preprocessor
from cvt.presets import PRESETS, preset_config, preset_preprocessor
from tests.cvt.random_models import PUBLISHED, TINY

#: preprocessor_config.json of microsoft/cvt-13; that of microsoft/cvt-13-384 differs in its size alone.
PUBLISHED_PREPROCESSING = {
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
}


@pytest.mark.parametrize(
    ("name", "published"), [("cvt-13", "20.0"), ("cvt-21", "31.6"), ("cvt-w24", "277.2")]
)
def test_parameters_are_as_many_as_published(name: str, published: str) -> None:
    with torch.device("meta"):
        model = CvtForImageClassification(preset_config(name, num_labels=1000))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count / 1e6:.1f}" == published


@pytest.mark.parametrize(
    ("name", "size", "exact", "published"),
    [
        ("cvt-13", 224, 4.566, 4.5),
        ("cvt-21", 224, 7.178, 7.1),
        ("cvt-13", 384, 16.269, 16.3),
        ("cvt-21", 384, 24.849, 24.9),
        ("cvt-w24", 384, 194.222, 193.2),
    ],
)
def test_multiply_accumulates_are_those_of_the_definition_and_about_as_published(
    name: str, size: int, exact: float, published: float
) -> None:
    config = preset_config(name, num_labels=1000)
    macs = count_macs(config, size, size)
    assert macs == expected_macs(config, size)
    assert round(macs / 1e9, 3) == exact
    assert macs / 1e9 == pytest.approx(published, rel=0.015)


@pytest.mark.parametrize("fields", [TINY, TINY | {"mlp_ratio": [2.0, 3.0, 1.0]}], ids=["tiny", "mlp_ratio"])
def test_multiply_accumulates_follow_the_configuration(fields: dict[str, Any]) -> None:
    config = CvtConfig(**fields, num_labels=7)
    assert count_macs(config, 64, 64) == expected_macs(config, 64)
    assert count_macs(config, 64, 128) == count_macs(config, 128, 64) > 2 * count_macs(config, 64, 64)


def expected_macs(config: CvtConfig, size: int) -> int:
    """After the definition in Microsoft's code (`Attention.compute_macs`, without biases), by hand."""
    total, channels, side = config.embed_dim[-1] * config.num_labels, 3, size
    for i, width in enumerate(config.embed_dim):
        side //= config.patch_stride[i]
        tokens, fewer = side**2, (side // 2) ** 2  # of queries; of keys and values
        total += config.patch_sizes[i] ** 2 * channels * width * tokens
        convolutions = 9 * width * (tokens + 2 * fewer)
        tokens, fewer = tokens + config.cls_token[i], fewer + config.cls_token[i]
        products = 2 * tokens * fewer * width
        projections = width**2 * (2 * tokens + 2 * fewer)
        mlp = 2 * width * int(width * config.mlp_ratio[i]) * tokens
        total += config.depth[i] * (convolutions + products + projections + mlp)
        channels = width
    return total


@pytest.mark.parametrize("name", PRESETS)
def test_architectures_are_those_of_the_published_configurations(name: str) -> None:
    ours, theirs = preset_config(name), transformers.CvtConfig(**PUBLISHED[name])
    for field in CvtConfig.__annotations__:
        if field != "drop_path_rate":  # matters to training alone
            assert list_or_value(getattr(ours, field)) == list_or_value(getattr(theirs, field)), field


def list_or_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_fields_come_before_the_presets() -> None:
    config = preset_config("cvt-21", depth=[1, 1, 1], num_labels=3)
    assert config.depth == [1, 1, 1]
    assert config.num_labels == 3
    assert preset_config("cvt-21").depth == [1, 4, 16]


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no preset 'cvt-14', only cvt-13, cvt-21, cvt-w24"):
        preset_config("cvt-14")


@pytest.mark.parametrize("size", [224, 384])
def test_preprocessing_is_that_of_the_published_checkpoints(size: int) -> None:
    published = Preprocessor.from_dict(PUBLISHED_PREPROCESSING | {"size": size}, "published")
    assert preset_preprocessor(size) == published
    assert preset_preprocessor(size)(Image.new("RGB", (300, 500))).shape == (size, size, 3)
