"""The benchmark of the model's runtimes, on small images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jobs.benchmarks.figures import BenchmarkError
from jobs.benchmarks.model import Classify, measure, model
from jobs.verify import load_model, transformers_classifier
from tests.command import invoke


@pytest.mark.slow
def test_variants_are_measured_and_their_logits_compared(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    only = ["--only", "engine, torch", "--only", "transformers, eager"]
    settings = ["--size", 32, "--count", 3, "--batch-size", 2, "--rounds", 2, "--device", "cpu"]
    done = invoke(model, *settings, *only, "--profile", "--output", figures)
    engine, eager = json.loads(figures.read_text())["variants"]
    assert (engine["variant"], engine["size"], engine["precision"]) == ("engine, torch", 32, "fp32")
    assert (eager["variant"], eager["to_eager"]) == ("transformers, eager", [1, 1])
    for variant in (engine, eager):
        assert len(variant["images_per_s"]) == len(variant["of_limit"]) == len(variant["to_eager"]) == 2
        assert variant["logits_off"] < 1e-4
    assert re.search(r"aten::\w+ .*%", done.stdout)


@pytest.mark.slow
def test_other_logits_show_and_lost_images_are_refused() -> None:
    checkpoint = load_model("fashion-mnist", None)
    images = np.zeros((2, 28, 28, 3), np.uint8)
    right = transformers_classifier(checkpoint)

    def shifted() -> Classify:
        return lambda images: right(images) + 2

    def lossy() -> Classify:
        return lambda images: right(images[1:])

    [found] = measure(checkpoint, "cpu", images, [("shifted", "fp32", shifted)], rounds=1)
    assert found.logits_off == pytest.approx(2, abs=1e-4)
    with pytest.raises(BenchmarkError, match="lossy: 1 images came out of 2"):
        measure(checkpoint, "cpu", images, [("lossy", "fp32", lossy)], rounds=1)


def test_unknown_model_ends_with_2() -> None:
    done = invoke(model, "--model", "fashion-mnist", "--size", 64, status=2)
    assert "has a size of its own" in done.stderr


def test_help_names_the_default_precisions() -> None:
    assert "(fp32; on a GPU" in invoke(model, "--help").stdout
