"""Tests of the model benchmark, on small images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.benchmarks.figures import BenchmarkError, compare_rates
from jobs.benchmarks.model import COMPILED, EAGER, Classify, available_variants, model
from jobs.reference import load_model, transformers_classifier
from tests.command import invoke


@pytest.mark.slow
def test_variants_are_measured_in_each_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def some_variants(*arguments: Any) -> dict[str, Classify]:
        found = available_variants(*arguments)
        assert COMPILED in found  # its first call takes minutes
        return {name: found[name] for name in (EAGER, "engine, torch")}

    monkeypatch.setattr("jobs.benchmarks.model.available_variants", some_variants)
    figures = tmp_path / "figures.json"
    settings = ["--size", 32, "--count", 3, "--batch-size", 2, "--rounds", 2, "--device", "cpu"]
    done = invoke(model, *settings, "--output", figures)
    results = json.loads(figures.read_text())
    assert results["settings"]["output"] == str(figures)
    eager, engine = results["variants"]
    assert (eager["variant"], eager["speedup"]) == (EAGER, [1, 1])
    assert engine["variant"] == "engine, torch"
    for variant in (engine, eager):
        assert (
            len(variant["images_per_s"]) == len(variant["fraction_of_limit"]) == len(variant["speedup"]) == 2
        )
    assert EAGER in done.stdout


@pytest.mark.slow
def test_variant_that_loses_an_image_fails() -> None:
    images = np.zeros((2, 28, 28, 3), np.uint8)
    classify = transformers_classifier(load_model("fashion-mnist", None))
    variants: dict[str, Classify] = {EAGER: classify, "lossy": lambda images: classify(images[1:])}
    with pytest.raises(BenchmarkError, match="lossy: 1 of 2 images were processed"):
        compare_rates(variants, images, 1, EAGER)


def test_runtime_that_cannot_run_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    variants = available_variants(load_model("fashion-mnist", None), "cpu", "fp16", 2)
    assert [*variants] == [EAGER, COMPILED, "engine, torch"]
    notices = capsys.readouterr().err
    assert "engine, compile: skipped: runtime 'compile' needs device 'cuda'" in notices
    assert "engine, openvino: skipped: runtime 'openvino'" in notices


def test_size_of_a_checkpoint_ends_with_2() -> None:
    done = invoke(model, "--model", "fashion-mnist", "--size", 64, status=2)
    assert "has its own size" in done.stderr
