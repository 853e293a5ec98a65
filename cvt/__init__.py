"""CvT (arXiv 2103.15808) on PyTorch: model, checkpoints, preprocessing and inference."""

from cvt.configuration import CvtConfig
from cvt.engine import Engine
from cvt.modeling import CvtForImageClassification, CvtModel
from cvt.preprocessing import Preprocessor

__all__ = ["CvtConfig", "CvtForImageClassification", "CvtModel", "Engine", "Preprocessor"]
