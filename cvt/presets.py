"""The published variants of CvT: their architectures and their preprocessing.

From table 2 of arXiv 2103.15808 and the configurations of https://github.com/microsoft/CvT. Weights belong to
`cvt.checkpoints`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from cvt.configuration import CvtConfig
from cvt.preprocessing import Preprocessor

#: Fields of `CvtConfig`, by the variant's name; the others have its defaults, which are CvT-13's.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "cvt-13": {"embed_dim": [64, 192, 384], "num_heads": [1, 3, 6], "depth": [1, 2, 10]},
    "cvt-21": {"embed_dim": [64, 192, 384], "num_heads": [1, 3, 6], "depth": [1, 4, 16]},
    "cvt-w24": {
        "embed_dim": [192, 768, 1024],
        "num_heads": [3, 12, 16],
        "depth": [2, 2, 20],
        "drop_path_rate": [0.0, 0.0, 0.3],
    },
}


def preset_config(name: str, **fields: Any) -> CvtConfig:
    """The configuration of a published variant, for images of any size.

    Args:
        name: a key of `PRESETS`.
        fields: of `CvtConfig` and PreTrainedConfig, such as `num_labels`; override the variant's.

    Raises:
        ValueError: there is no such variant, or the fields do not describe a model.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}, only {', '.join(PRESETS)}")
    return CvtConfig(**{**PRESETS[name], **fields})


def preset_preprocessor(size: int = 224) -> Preprocessor:
    """The preprocessing of the published checkpoints, for images of `size` pixels in height and width."""
    return Preprocessor(
        size=size,
        crop_pct=0.875,
        resample=int(Image.Resampling.BICUBIC),
        mean=(0.485, 0.456, 0.406),  # of ImageNet
        std=(0.229, 0.224, 0.225),
        rescale_factor=1 / 255,
    )
