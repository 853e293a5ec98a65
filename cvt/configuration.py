"""CvtConfig: the configuration of a CvT for transformers.

The base class PreTrainedConfig of transformers handles files, the hub and labels. `cvt.architecture` has the
fields and their validation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from cvt.architecture import PRESETS, Architecture


class CvtConfig(PreTrainedConfig, Architecture):
    """Configuration of a CvT, a drop-in replacement for `transformers.CvtConfig`.

    The constructor takes the fields of `cvt.architecture.Architecture` and of PreTrainedConfig (`num_labels`,
    `id2label`, ...) as keyword arguments.
    """

    model_type = "cvt"

    def __init__(self, **kwargs: Any) -> None:
        for field in dataclasses.fields(Architecture):
            setattr(self, field.name, kwargs.pop(field.name, field.default))
        super().__init__(**kwargs)
        Architecture.from_dict(vars(self))  # validates the fields


def preset_config(name: str, **fields: Any) -> CvtConfig:
    """Returns the configuration of a published variant, a key of `PRESETS`.

    Raises:
        ValueError: the name is unknown, or `fields` do not describe a valid model.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return CvtConfig(**{**PRESETS[name], **fields})
