"""Tests of the benchmark of scale: simulated classifiers on Ray, and planning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmarks.driver_scale import measure_planning
from jobs.benchmarks.scale import scale
from tests.command import invoke


@pytest.mark.slow
@pytest.mark.long
def test_simulated_classifiers_label_every_image_on_gpus_of_ray(tmp_path: Path) -> None:
    """Ray counts the GPUs, so this is also the test of the dataflow with GPUs."""
    figures = tmp_path / "figures.json"
    options = ["--classifiers", 2, "--chunk-images", 16, "--seconds", 2, "--shards", "none"]
    done = invoke(scale, *options, "--output", figures)
    rows = json.loads(figures.read_text())["driver"]
    assert [row["stages"] for row in rows] == [2, 3]
    for row in rows:
        assert row["processes"] == row["classifiers"] == 2
        assert row["images_checked"] >= row["chunks"] * 16 > 0
        assert row["driver_cpu_ms_per_chunk"] > 0
    assert "classifiers" in done.stdout


def test_planning_is_measured_by_step() -> None:
    rows: list[dict[str, Any]] = []
    measure_planning({"shards": 3000}, rows.append)
    assert [row["step"] for row in rows][-2:] == ["read the manifest", "plan a run with nothing new"]
    assert all(row["shards"] == 3000 and row["peak_memory_mb"] > 50 for row in rows)


@pytest.mark.parametrize("numbers", ["0", "1,", "x"])
def test_invalid_number_of_classifiers_ends_with_2(numbers: str) -> None:
    assert "expected numbers from 1" in invoke(scale, "--classifiers", numbers, status=2).stderr
