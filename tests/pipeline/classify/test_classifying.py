from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cvt.inference import EngineOutput
from pipeline.classify import classify
from pipeline.predictions import PredictionOptions
from pipeline.read import Chunk

LABELS = ("zero", "one", "two", "three")


class Backend:
    """Returns the first four values of the first row of pixels as logits."""

    def __call__(self, images: np.ndarray) -> EngineOutput:
        values = images[:, 0, :4, 0].astype(np.float32)
        values[values == 255] = np.nan
        return EngineOutput(values, values[:, :3] / 8)


def options(topk: int = 3, embedding: str = "none") -> PredictionOptions:
    return PredictionOptions(LABELS, topk, embedding, 3)


def chunk(logits: list[list[int]], errors: list[str | None]) -> Chunk:
    pixels = np.zeros((len(logits), 4, 4, 3), np.uint8)
    if logits:
        pixels[:, 0, :, 0] = logits
    samples = pa.table({"key": [str(i) for i in range(len(errors))], "error": pa.array(errors, pa.string())})
    return Chunk(0, 0, samples, pixels=pixels)


def test_predictions_are_the_softmax_of_the_logits() -> None:
    done = classify(chunk([[0, 2, 1, 0]], [None]), Backend(), options())
    [row] = done.samples.to_pylist()
    p = np.exp([0, 2, 1, 0]) / np.exp([0, 2, 1, 0]).sum()
    assert (row["label"], row["label_id"]) == ("one", 1)
    assert row["score"] == pytest.approx(p[1])
    assert row["topk_label_ids"] == [1, 2, 0]  # of equal scores, the lower id is first
    assert row["topk_scores"] == pytest.approx([p[1], p[2], p[0]])
    assert row["entropy"] == pytest.approx(-(p * np.log(p)).sum())
    assert done.pixels is None


def test_error_rows_have_no_predictions_and_others_keep_their_rows() -> None:
    done = classify(
        chunk([[9, 0, 0, 0], [0, 0, 0, 9]], ["corrupt", None, "empty", None]), Backend(), options()
    )
    assert done.samples["label"].to_pylist() == [None, "zero", None, "three"]
    assert done.samples["score"].null_count == done.samples["topk_scores"].null_count == 2


def test_chunk_with_only_errors_has_the_same_columns() -> None:
    bad = classify(chunk([], ["a", "b"]), Backend(), options(embedding="float16"))
    good = classify(chunk([[1, 2, 3, 4]], [None]), Backend(), options(embedding="float16"))
    assert bad.samples.schema == good.samples.schema
    assert bad.samples["label_id"].null_count == bad.samples["embedding"].null_count == 2


def test_empty_chunk_stays_empty() -> None:
    assert classify(chunk([], []), Backend(), options()).samples.num_rows == 0


@pytest.mark.parametrize("embedding", ["float16", "float32"])
def test_embeddings_are_present_if_requested(embedding: str) -> None:
    done = classify(chunk([[8, 4, 2, 1]], [None, "bad"][:1]), Backend(), options(embedding=embedding))
    column = done.samples["embedding"]
    assert str(column.type.value_type) == {"float16": "halffloat", "float32": "float"}[embedding]
    assert column.to_pylist() == [[1.0, 0.5, 0.25]]


def test_non_finite_output_is_an_error_of_that_image_only() -> None:
    done = classify(
        chunk([[9, 0, 0, 0], [255, 0, 0, 0], [0, 9, 0, 0]], [None, None, "bad", None]), Backend(), options()
    )
    assert done.samples["label"].to_pylist() == ["zero", None, None, "one"]
    assert done.samples["error"].to_pylist() == [
        None,
        "non-finite output: the model returned NaN or infinity for this image",
        "bad",
        None,
    ]


def test_very_large_logits_do_not_overflow() -> None:
    [row] = classify(chunk([[254, 0, 0, 0]], [None]), Backend(), options()).samples.to_pylist()
    assert row["score"] == 1.0
    assert row["entropy"] == 0.0


class Fragile(Backend):
    """A model that fails for whole batches if one of their images starts with 200."""

    def __call__(self, images: np.ndarray) -> EngineOutput:
        if (images[:, 0, 0, 0] == 200).any():
            raise RuntimeError("shape mismatch")
        return super().__call__(images)


@pytest.mark.parametrize("bad", [[0], [6], [2, 3], [0, 1, 5], [0, 1, 2, 3, 4, 5], [*range(7)]])
def test_model_failure_is_an_error_of_that_image_only(bad: list[int]) -> None:
    logits = [[200 if i in bad else 1, 0, i, 0] for i in range(7)]
    errors = [None, "corrupt", *[None] * 6]
    rows = classify(chunk(logits, errors), Fragile(), options(embedding="float32")).samples.to_pylist()
    expected = classify(
        chunk([[1, 0, i, 0] for i in range(7)], errors), Backend(), options(embedding="float32")
    ).samples.to_pylist()
    for index, (row, expected_row) in enumerate(zip(rows, expected, strict=True)):
        image = index - (index > 1)
        if index != 1 and image in bad:
            assert row["error"] == "model failed: RuntimeError: shape mismatch"
            assert row["label"] is row["score"] is row["embedding"] is None
        else:
            assert row == expected_row


def test_pixels_can_be_a_tensor_on_the_device_of_the_model() -> None:
    class OnDevice(Fragile):
        def __call__(self, images: Any) -> EngineOutput:
            assert isinstance(images, torch.Tensor)
            assert images.dtype == torch.uint8
            return super().__call__(images.numpy())

    array = chunk([[200 if i == 2 else 1, 0, i, 0] for i in range(7)], [None, "corrupt", *[None] * 6])
    assert isinstance(array.pixels, np.ndarray)
    tensor = replace(array, pixels=torch.from_numpy(array.pixels))
    done, wanted = classify(tensor, OnDevice(), options()), classify(array, Fragile(), options())
    assert done.pixels is None
    assert done.samples.equals(wanted.samples)
    assert done.samples["error"].null_count == 6


def test_device_failure_is_not_an_error_of_the_images() -> None:
    class Breaking(Backend):
        calls = 0

        def __call__(self, images: np.ndarray) -> EngineOutput:
            self.calls += 1
            if self.calls != 2:
                raise RuntimeError("device lost")
            return super().__call__(images)

    with pytest.raises(RuntimeError, match="device lost"):
        classify(chunk([[1, 0, 0, 0]] * 8, [None] * 8), Breaking(), options())


@pytest.mark.parametrize("count", [1, 5])
def test_model_that_fails_for_a_black_image_raises(count: int) -> None:
    class Broken(Backend):
        def __call__(self, images: np.ndarray) -> EngineOutput:
            raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        classify(chunk([[1, 0, 0, 0]] * count, [None] * count), Broken(), options())
