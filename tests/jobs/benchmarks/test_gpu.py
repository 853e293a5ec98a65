"""Tests of the GPU benchmark on a machine without a GPU: what can run runs, and the rest is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.benchmarks import gpu as command
from jobs.benchmarks.gpu import SECTIONS, gpu
from jobs.benchmarks.gpu_sections import SECTIONS as FUNCTIONS
from tests.command import invoke

SMALL = ["--device", "cpu", "--model", "fashion-mnist", "--count", 8, "--batch-size", 8]


@pytest.mark.slow
@pytest.mark.long
def test_sections_that_need_a_gpu_are_reported_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, plan in SECTIONS.items():  # other tests keep the machine busy
        monkeypatch.setitem(SECTIONS, name, plan._replace(seconds=500))
    output = tmp_path / "gpu.json"
    done = invoke(
        gpu, *SMALL, "--sections", "machine,nvjpeg,precisions,decoding,streams,model", "--output", output
    )
    found = {each["section"]: each for each in json.loads(output.read_text())["sections"]}
    assert {name: each["status"] for name, each in found.items()} == {
        "machine": "ok",
        "nvjpeg": "not run",
        "precisions": "ok",
        "decoding": "not run",  # the rates of the CPU are there
        "streams": "not run",
        "model": "ok",
    }
    assert found["nvjpeg"]["reason"] == "needs a GPU (--device cuda)"
    assert [row["precision"] for row in found["precisions"]["rows"]] == ["fp32", "bf16", "fp16"]
    assert all(row["passed"] and row["images"] == 1000 for row in found["precisions"]["rows"])
    assert [row["decoder"] for row in found["decoding"]["rows"]] == ["CPU, 1 thread", "CPU, all threads"]
    assert found["streams"]["rows"] == [{"part": "engine", "calls": 12, "different": 0}]
    assert [row["variant"] for row in found["model"]["rows"]] == ["transformers, eager", "engine, torch"]
    assert "needs a GPU" in done.stdout


@pytest.mark.slow
def test_whole_jobs_are_counted_without_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    invoke(gpu, *SMALL, "--sections", "pipeline", "--job-images", 64, "--output", output)
    [section] = json.loads(output.read_text())["sections"]
    assert (section["status"], section["reason"]) == ("ok", None)
    [row] = section["rows"]
    assert (row["images"], row["decoder"], row["failure"]) == (64, "cpu", None)
    assert row["seconds"][0] > row["first_labels_s"][0] > 0


def test_sections_without_time_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_MIN_S", 1e9)
    output = tmp_path / "gpu.json"
    invoke(gpu, *SMALL, "--output", output)
    sections = json.loads(output.read_text())["sections"]
    assert [each["section"] for each in sections] == list(SECTIONS)
    assert {each["reason"] for each in sections} == {"the time of --minutes is over"}


def test_every_section_has_a_function() -> None:
    assert [*SECTIONS] == [*FUNCTIONS]


def test_unknown_section_ends_with_2() -> None:
    assert "choose from machine, nvjpeg" in invoke(gpu, "--sections", "machine,cpu", status=2).stderr
