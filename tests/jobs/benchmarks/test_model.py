"""The benchmark of the model, on small images."""

from __future__ import annotations

import json
import re
from pathlib import Path

from jobs.benchmarks.model import benchmark_model
from tests.command import invoke


def test_the_models_benchmark_checks_what_it_measures(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    only = [word for name in ("engine, torch", "transformers, eager") for word in ("--only", name)]
    settings = ["--size", 64, "--count", 3, "--batch-size", 2, "--rounds", 2, "--device", "cpu"]
    done = invoke(benchmark_model, *settings, *only, "--profile", "--output", figures)
    engine, eager = json.loads(figures.read_text())
    assert (engine["name"], engine["size"], engine["precision"]) == ("engine, torch", 64, "fp32")
    assert eager["name"] == "transformers, eager"
    for way in (engine, eager):
        assert len(way["rates"]) == len(way["shares"]) == 2
        assert all(0 < share < 2 for share in way["shares"])
        assert way["difference"] < 1e-4
    assert re.search(r"aten::\w+ .*%", done.stdout)


def test_the_models_benchmark_names_the_models_it_knows() -> None:
    done = invoke(benchmark_model, "--model", "cvt-99", "--size", 64, status=2)
    assert "'cvt-99' is none of cvt-13, cvt-21, cvt-w24" in done.stderr


def test_help_names_the_default_precisions() -> None:
    assert "(fp32; on a GPU" in invoke(benchmark_model, "--help").stdout
