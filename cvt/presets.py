"""Architectures and preprocessing of the published CvT variants.

The values are from table 2 of arXiv 2103.15808 and from the configurations of https://github.com/microsoft/CvT.
`cvt.checkpoints` loads weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image

from cvt.preprocessing import Preprocessor

if TYPE_CHECKING:
    from cvt.configuration import CvtConfig

#: Fields of `Architecture` by the name of the variant. All other fields have their defaults.
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
    """Returns the configuration of a published variant, a key of `PRESETS`.

    Raises:
        ValueError: the name is unknown, or `fields` do not describe a valid model.
    """
    from cvt.configuration import CvtConfig  # imports transformers, which takes seconds

    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return CvtConfig(**{**PRESETS[name], **fields})


def preset_preprocessor(size: int = 224) -> Preprocessor:
    """Returns the preprocessing of the published checkpoints, for an image size of `size` pixels."""
    return Preprocessor(
        size=size,
        crop_pct=0.875,
        resample=int(Image.Resampling.BICUBIC),
        mean=(0.485, 0.456, 0.406),  # ImageNet statistics
        std=(0.229, 0.224, 0.225),
        rescale_factor=1 / 255,
    )
