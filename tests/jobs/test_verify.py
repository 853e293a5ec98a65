"""Tests of the command `verify`, on the images in the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cvt.inference.engine import PRECISIONS
from cvt.runtimes import fastest_runtime
from jobs.convert import convert
from jobs.reference import load_model
from jobs.verify import agreement, verify
from pipeline.config import ConfigError
from tests.command import invoke
from tests.cvt.random_models import shallow

SAMPLES = Path(__file__).parents[2] / "jobs" / "data" / "fashion-mnist"


@pytest.mark.slow
def test_bundled_model_agrees_with_transformers() -> None:
    done = invoke(verify, "--images", SAMPLES, "--count", 300)
    rows = [line.split() for line in done.stdout.splitlines() if "yes" in line or "no" in line.split()]
    processor = "cuda" if torch.cuda.is_available() else "cpu"
    expected = {precision: fastest_runtime(processor, precision) for precision in PRECISIONS}
    # On a CPU without instructions for bf16, OpenVINO does not support it.
    skipped = {precision for precision in PRECISIONS if f"engine: {precision}: skipped" in done.stderr}
    assert skipped <= {"bf16"}
    assert [row[:3] for row in rows] == [
        [runtime, precision, "300"] for precision, runtime in expected.items() if precision not in skipped
    ]
    assert rows[0][3] == "100.00%"
    assert float(rows[0][4]) < 1e-4 < float(rows[1][4])
    assert {row[5] for row in rows} == {"yes"}


def test_model_that_transformers_cannot_load_is_explained(tmp_path: Path) -> None:
    shallow(tmp_path / "shallow")
    done = invoke(verify, "--images", SAMPLES, "--count", 1, "--model", tmp_path / "shallow", status=4)
    assert "model 'shallow': nothing to compare with: transformers cannot load this model" in done.stderr
    assert "its CvT needs depth[1] > 1, not 1" in done.stderr


def test_model_with_quick_gelu_agrees_with_transformers_layers(tmp_path: Path) -> None:
    invoke(convert, "fashion-mnist", tmp_path / "quick", "--activation", "quick_gelu")
    arguments = "--model", tmp_path / "quick", "--precision", "fp32", "--count", 100
    done = invoke(verify, "--images", SAMPLES, *arguments)
    assert [line.split()[-1] for line in done.stdout.splitlines() if "fp32" in line] == ["yes"]


def test_missing_model_ends_with_4(tmp_path: Path) -> None:
    assert "no config.json" in invoke(verify, "--images", SAMPLES, "--model", tmp_path, status=4).stderr


@pytest.mark.parametrize(
    ("precision", "correct", "difference", "passed"),
    [
        ("fp32", 200, 5e-5, True),
        ("fp32", 200, 2e-4, False),
        ("fp32", 199, 5e-5, False),
        ("bf16", 199, 0.1, True),
        ("bf16", 198, 0.1, False),
    ],
)
def test_precision_passes_within_its_goals(
    precision: str, correct: int, difference: float, passed: bool
) -> None:
    reference = np.zeros((200, 3))
    reference[:, 2] = 1e-5  # a difference in class 0 changes the top class, the same one in class 2 keeps it
    logits = reference.copy()
    logits[:correct, 2] += difference
    logits[correct:, 0] += difference
    measured = agreement(precision, logits, reference)
    assert measured == (correct / 200, pytest.approx(difference), passed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp8"], "fp8"),
        (["--runtime", "openvino", "--precision", "fp16"], "does not support precision 'fp16'"),
    ],
)
def test_unavailable_precision_ends_with_2(arguments: list[str], message: str) -> None:
    assert message in invoke(verify, "--images", SAMPLES, "--count", 1, *arguments, status=2).stderr


def test_size_applies_only_to_random_weights() -> None:
    with pytest.raises(ConfigError, match="fashion-mnist has its own size"):
        load_model("fashion-mnist", 224)
