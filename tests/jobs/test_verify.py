"""`verify` on the images that come with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs.reference import load_model
from jobs.verify import agreement, is_reached, verify
from pipeline.config import ConfigError
from tests.command import invoke

SAMPLES = Path(__file__).parents[2] / "jobs" / "data" / "fashion-mnist"


def test_verify_compares_the_bundled_model_with_transformers() -> None:
    done = invoke(verify, "--images", SAMPLES, "--count", 300)
    rows = [line.replace("│", " ").split() for line in done.stdout.splitlines() if "torch" in line]
    assert [row[:3] for row in rows] == [["torch", name, "300"] for name in ("fp32", "bf16", "fp16")]
    assert rows[0][3] == "100.00%"
    assert float(rows[0][4]) < 1e-4 < float(rows[1][4])
    assert [row[5] for row in rows] == ["yes", "yes", "yes"]


def test_verify_of_a_model_that_is_not_there_ends_with_4(tmp_path: Path) -> None:
    assert "no config.json" in invoke(verify, "--images", SAMPLES, "--model", tmp_path, status=4).stderr


@pytest.mark.parametrize(
    ("precision", "right", "difference", "reached"),
    [
        ("fp32", 200, 5e-5, True),
        ("fp32", 200, 2e-4, False),
        ("fp32", 199, 5e-5, False),
        ("bf16", 199, 0.1, True),
        ("bf16", 198, 0.1, False),
    ],
)
def test_what_is_to_be_reached(precision: str, right: int, difference: float, reached: bool) -> None:
    wanted = np.zeros((200, 3))
    wanted[:, 2] = 1e-5  # so little above the others that the same difference loses or keeps the top class
    found = wanted.copy()
    found[:right, 2] += difference
    found[right:, 0] += difference
    measured = agreement(found, wanted)
    assert measured == (right / 200, pytest.approx(difference))
    assert is_reached(precision, *measured) == reached


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp8"], "fp8"),
        (["--runtime", "openvino", "--precision", "fp16"], "has no precision 'fp16'"),
    ],
)
def test_what_cannot_be_compared_is_told_at_once(arguments: list[str], message: str) -> None:
    assert message in invoke(verify, "--images", SAMPLES, "--count", 1, *arguments, status=2).stderr


def test_size_is_only_for_random_weights() -> None:
    with pytest.raises(ConfigError, match="fashion-mnist has a size of its own"):
        load_model("fashion-mnist", 224)
