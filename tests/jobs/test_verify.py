"""What `verify` and `benchmark-model` find, on small things; the commands as a person calls them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jobs.verify import Agreement
from tests.jobs.test_cli import cvt_label

SAMPLES = Path(__file__).parents[2] / "jobs" / "data" / "fashion-mnist"


def test_verify_compares_the_bundled_model_with_transformers() -> None:
    done = cvt_label(
        "verify", "--images", SAMPLES, "--count", 300, "--precision", "fp32", "--precision", "bf16"
    )
    assert done.returncode == 0, done.stderr
    rows = [line.replace("│", " ").split() for line in done.stdout.splitlines() if "torch" in line]
    assert [row[:4] for row in rows] == [
        ["torch", "fp32", "300", "100.00%"],
        ["torch", "bf16", "300", rows[1][3]],
    ]
    assert float(rows[0][4]) < 1e-4 < float(rows[1][4])
    assert [row[5] for row in rows] == ["yes", "yes"]


def test_verify_of_a_model_that_is_not_there_ends_with_4(tmp_path: Path) -> None:
    done = cvt_label("verify", "--images", SAMPLES, "--model", tmp_path)
    assert (done.returncode, "no config.json" in done.stderr) == (4, True)


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
    agreement = Agreement.of("torch", precision, found, wanted)
    assert (agreement.top1, agreement.difference) == (right / 200, pytest.approx(difference))
    assert agreement.is_reached == reached


def test_the_models_benchmark_checks_what_it_measures(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    only = [word for name in ("engine, torch", "transformers, eager") for word in ("--only", name)]
    settings = ["--size", 64, "--count", 3, "--batch-size", 2, "--rounds", 2, "--device", "cpu"]
    done = cvt_label("benchmark-model", *settings, *only, "--profile", "--output", figures)
    assert done.returncode == 0, done.stderr
    engine, eager = json.loads(figures.read_text())
    assert (engine["name"], engine["size"], engine["precision"]) == ("engine, torch", 64, "fp32")
    assert eager["name"] == "transformers, eager"
    for way in (engine, eager):
        assert len(way["rates"]) == len(way["shares"]) == 2
        assert all(0 < share < 2 for share in way["shares"])
        assert way["difference"] < 1e-4
    assert re.search(r"aten::\w+ .*%", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp8"], "fp8"),
        (["--runtime", "openvino", "--precision", "fp16"], "has no precision 'fp16'"),
    ],
)
def test_what_cannot_be_compared_is_told_at_once(arguments: list[str], message: str) -> None:
    done = cvt_label("verify", "--images", SAMPLES, "--count", 1, *arguments)
    assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (2, True, False)


def test_help_says_what_is_taken_where_nothing_is_said() -> None:
    assert "(torch)" in cvt_label("verify", "--help").stdout
    assert "(fp32; on a GPU" in cvt_label("benchmark-model", "--help").stdout


def test_the_models_benchmark_names_the_models_it_knows() -> None:
    done = cvt_label("benchmark-model", "--model", "cvt-99", "--size", 64)
    assert (done.returncode, "'cvt-99' is none of cvt-13, cvt-21, cvt-w24" in done.stderr) == (2, True)
