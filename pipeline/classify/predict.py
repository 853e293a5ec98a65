"""Classifies a chunk: pixels in, prediction columns out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.predictions import (
    ErrorCategory,
    PredictionOptions,
    SampleError,
    model_output_fields,
    sample_error,
)
from pipeline.read import Chunk
from pipeline.text import single_line

if TYPE_CHECKING:
    from torch import Tensor

    from cvt.inference import EngineOutput

logger = logging.getLogger("cvt_label")

#: A model: maps uint8 images (n, height, width, 3), n >= 1, to logits and embeddings. The images are an
#: array, or a tensor on the model's device; `classify` only slices them.
Backend = Callable[[Any], "EngineOutput"]


def classify(chunk: Chunk, backend: Backend, options: PredictionOptions) -> Chunk:
    """Adds the prediction columns to the samples of a chunk, and drops the pixels.

    Samples with an error have null in every prediction column. An image becomes an error if the model fails
    for it, or returns a logit that is not finite (possible in half precision).

    Raises:
        Exception: the model also fails for a black image, so the images are not the cause.
    """
    samples, pixels = chunk.samples, chunk.pixels
    errors: list[SampleError | None] = samples["error"].to_pylist()
    rows = [row for row, error in enumerate(errors) if error is None]
    fields = model_output_fields(options.embedding, options.embedding_width)
    columns = [pa.nulls(0, field.type) for field in fields]
    if pixels is not None and rows:
        outputs = list(_predict_bisecting(backend, pixels, rows, errors))
        answered = [row for row in rows if errors[row] is None]
        if len(answered) < len(rows):  # also after the last failure: the device may have broken in between
            backend(pixels[:1] * 0)
        if outputs:
            logits = np.concatenate([part.logits for part in outputs])
            embeddings = np.concatenate([part.embeddings for part in outputs])
            finite = np.isfinite(logits).all(axis=1)
            for index in np.flatnonzero(~finite).tolist():
                detail = "the model returned NaN or infinity for this image"
                errors[answered[index]] = sample_error(ErrorCategory.NON_FINITE_OUTPUT, detail)
            predicted = _predict(logits[finite], options)
            if options.embedding != "none":
                values = pa.array(embeddings[finite].astype(options.embedding).reshape(-1))
                predicted["embedding"] = pa.FixedSizeListArray.from_arrays(values, options.embedding_width)
            columns = [predicted[field.name].cast(field.type) for field in fields]
    error_index = samples.schema.get_field_index("error")
    samples = samples.set_column(error_index, "error", pa.array(errors, pa.string()))
    # Places the values in the rows without an error, and null in all other rows.
    is_good = pc.is_null(samples["error"]).to_numpy()
    indices = pa.array(np.cumsum(is_good) - 1, pa.int64(), mask=~is_good)
    for field, values in zip(fields, columns, strict=True):
        samples = samples.append_column(field, values.take(indices))
    return replace(chunk, samples=samples, pixels=None)


def _predict_bisecting(
    backend: Backend, pixels: np.ndarray | Tensor, rows: list[int], errors: list[SampleError | None]
) -> Iterator[EngineOutput]:
    """Yields the outputs of the model; after a failure, tries each half.

    Sets the errors of images for which the model fails; `rows` are the rows of the images in the chunk.
    """
    try:
        outputs = backend(pixels)
    except Exception as error:
        if len(rows) == 1:
            detail = single_line(f"{type(error).__name__}: {error}")
            errors[rows[0]] = sample_error(ErrorCategory.MODEL_FAILED, detail)
            return
        backend(pixels[:1] * 0)  # raises if the device is broken, and not the images
        half = len(rows) // 2
        logger.warning("the model failed for %d images; trying each half: %s", len(rows), error)
        yield from _predict_bisecting(backend, pixels[:half], rows[:half], errors)
        yield from _predict_bisecting(backend, pixels[half:], rows[half:], errors)
    else:
        yield outputs


def _predict(logits: np.ndarray, options: PredictionOptions) -> dict[str, pa.Array]:
    """Returns prediction columns for logits (n, classes)."""
    # In float64, the sum over 22,000 classes loses no digit of a float32 score.
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True, initial=-np.inf)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    top = _top_classes(p, options.topk)
    top_p = np.take_along_axis(p, top, axis=1).astype(np.float32)
    ends = pa.array(np.arange(len(p) + 1) * options.topk, pa.int32())
    label_id = pa.array(top[:, 0], pa.int32())
    return {
        "label": pa.array(options.labels, pa.string()).take(label_id),
        "label_id": label_id,
        "score": pa.array(top_p[:, 0]),
        "topk_label_ids": pa.ListArray.from_arrays(ends, pa.array(top.reshape(-1), pa.int32())),
        "topk_scores": pa.ListArray.from_arrays(ends, pa.array(top_p.reshape(-1))),
        "entropy": pa.array(-(p * log_p).sum(axis=1).astype(np.float32)),
    }


def _top_classes(p: np.ndarray, k: int) -> np.ndarray:
    """Returns the ids of the k classes with the highest probability, highest first; int64 (n, k).

    Of classes with equal probability, the lower id comes first.
    """
    candidates = np.sort(np.argpartition(-p, k - 1, axis=1)[:, :k], axis=1)
    order = np.argsort(-np.take_along_axis(p, candidates, axis=1), axis=1, kind="stable")
    return np.take_along_axis(candidates, order, axis=1)
