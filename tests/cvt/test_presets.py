"""Tests of the presets against arXiv 2103.15808 and Microsoft's model zoo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from cvt.architecture import FIELDS, PRESETS
from cvt.modeling import CvtForImageClassification, preset_config
from cvt.preprocessing import Preprocessor
from tests.cvt.random_models import PUBLISHED

#: preprocessor_config.json of microsoft/cvt-13. The file of microsoft/cvt-13-384 differs only in size.
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
def test_number_of_parameters_equals_published_value(name: str, published: str) -> None:
    with torch.device("meta"):
        model = CvtForImageClassification(preset_config(name, num_labels=1000))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count / 1e6:.1f}" == published


@pytest.mark.parametrize("name", PRESETS)
def test_architectures_equal_published_configurations(name: str) -> None:
    ours, theirs = preset_config(name), transformers.CvtConfig(**PUBLISHED[name])
    for field in FIELDS:
        if field not in ("drop_path_rate", "hidden_act"):  # affects only training; not in transformers
            assert list_or_value(getattr(ours, field)) == list_or_value(getattr(theirs, field)), field


def list_or_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_fields_override_the_preset() -> None:
    config = preset_config("cvt-21", depth=[1, 1, 1], num_labels=3)
    assert config.depth == [1, 1, 1]
    assert config.num_labels == 3
    assert preset_config("cvt-21").depth == [1, 4, 16]


def test_unknown_preset_fails_and_lists_presets() -> None:
    with pytest.raises(ValueError, match="unknown preset 'cvt-14'; choose one of cvt-13, cvt-21, cvt-w24"):
        preset_config("cvt-14")


@pytest.mark.parametrize("size", [224, 384])
def test_preprocessing_equals_published_checkpoints(size: int) -> None:
    published = Preprocessor.from_dict(PUBLISHED_PREPROCESSING | {"size": size}, "published")
    assert Preprocessor.published(size) == published
    assert Preprocessor.published(size)(Image.new("RGB", (300, 500))).shape == (size, size, 3)
