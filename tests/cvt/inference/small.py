"""A small model, images for it, and its expected outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cvt.inference.engine import Engine
from cvt.inference.network import InferenceNetwork
from cvt.modeling import CvtConfig, CvtForImageClassification
from cvt.preprocessing import Preprocessor
from tests.cvt.random_models import TINY, randomize, repeat_stage

SIZE = 48
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSOR = Preprocessor(SIZE, crop_pct=0.875, resample=3, mean=MEAN, std=STD, rescale_factor=1 / 255)
IMAGES = np.random.default_rng(0).integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8)


def make_model(**fields: Any) -> CvtForImageClassification:
    return randomize(CvtForImageClassification(CvtConfig(**TINY | {"num_labels": 5} | fields)))


def make_one_stage_model() -> CvtForImageClassification:
    """Returns a model with one layer, because each kernel takes a second to compile."""
    return make_model(**repeat_stage(-1, 1, **TINY) | {"depth": [1]})


def network(model: CvtForImageClassification) -> InferenceNetwork:
    return InferenceNetwork(model, PREPROCESSOR, torch.float32)


def make_engine(model: CvtForImageClassification | None = None, **options: Any) -> Engine:
    return Engine(model or make_model(), PREPROCESSOR, **{"device": "cpu"} | options)


@torch.inference_mode()
def model_outputs(
    model: CvtForImageClassification, images: np.ndarray = IMAGES
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits and the inputs of the classifier."""
    seen = []
    with model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        normalized = (images / 255 - MEAN) / STD
        logits = model(torch.tensor(normalized, dtype=torch.float32).permute(0, 3, 1, 2)).logits
    return logits.numpy(), seen[0].numpy()


def assert_equals_model(engine: Engine, model: CvtForImageClassification, tolerance: float = 1e-4) -> None:
    logits, embeddings = model_outputs(model)
    output = engine(IMAGES)
    assert output.logits.dtype == output.embeddings.dtype == np.float32
    np.testing.assert_allclose(output.logits, logits, atol=tolerance, rtol=0)
    np.testing.assert_allclose(output.embeddings, embeddings, atol=tolerance, rtol=0)
    repeated = engine(IMAGES)
    np.testing.assert_array_equal(repeated.logits, output.logits)
    np.testing.assert_array_equal(repeated.embeddings, output.embeddings)
