"""The published variants of CvT: their architectures, and the preprocessing that they were trained with.

From table 2 of arXiv 2103.15808 and the configurations of https://github.com/microsoft/CvT. What a variant
doesn't name is as in CvT-13, whose fields are `CvtConfig`'s defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from cvt.configuration import CvtConfig
from cvt.preprocessing import Preprocessor

#: Fields of `CvtConfig`, by the variant's name.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "cvt-13": {
        "embed_dim": [64, 192, 384],
        "num_heads": [1, 3, 6],
        "depth": [1, 2, 10],
        "drop_path_rate": [0.0, 0.0, 0.1],
    },
    "cvt-21": {
        "embed_dim": [64, 192, 384],
        "num_heads": [1, 3, 6],
        "depth": [1, 4, 16],
        "drop_path_rate": [0.0, 0.0, 0.1],
    },
    "cvt-w24": {
        "embed_dim": [192, 768, 1024],
        "num_heads": [3, 12, 16],
        "depth": [2, 2, 20],
        "drop_path_rate": [0.0, 0.0, 0.3],
    },
}

#: Height and width in pixels of the images that the published checkpoints take.
SIZES = (224, 384)

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def preset_config(name: str, **fields: Any) -> CvtConfig:
    """The configuration of a published variant; the architecture is the same for every image size.

    Args:
        name: of `PRESETS`.
        fields: of `CvtConfig` and PreTrainedConfig, such as `num_labels`; they come before the variant's.

    Raises:
        ValueError: there is no such variant, or the fields don't describe a model.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}, only {', '.join(PRESETS)}")
    return CvtConfig(**{**PRESETS[name], **fields})


def preset_preprocessor(size: int = 224) -> Preprocessor:
    """The preprocessing of the published checkpoints.

    Below 384 pixels: the shortest edge to size / 0.875, then the crop of the centre; from 384 on, the whole
    image squashed into the square. Bicubic, with ImageNet's mean and deviation.

    Args:
        size: height and width of the model's input in pixels.
    """
    return Preprocessor(
        size=size,
        crop_pct=0.875,
        resample=int(Image.Resampling.BICUBIC),
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        rescale_factor=1 / 255,
    )
