"""CvT (arXiv 2103.15808) on PyTorch: model, checkpoints, preprocessing and inference."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvt.inference.engine import Engine
    from cvt.modeling import CvtConfig, CvtForImageClassification, CvtModel
    from cvt.preprocessing import Preprocessor

_MODULES = {
    "CvtConfig": "cvt.modeling",
    "CvtForImageClassification": "cvt.modeling",
    "CvtModel": "cvt.modeling",
    "Engine": "cvt.inference",
    "Preprocessor": "cvt.preprocessing",
}

__all__ = ["CvtConfig", "CvtForImageClassification", "CvtModel", "Engine", "Preprocessor"]


def __getattr__(name: str) -> Any:
    # Imported on first use, because torch and transformers take seconds and hundreds of megabytes. Workers
    # that only decode images need neither.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
