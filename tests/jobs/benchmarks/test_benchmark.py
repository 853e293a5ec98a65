"""The benchmark: what it computes and prints, and whole small runs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from jobs.benchmarks.benchmark import Options, _failures_told, _measure
from jobs.benchmarks.contenders import ContenderError, Run, WrongCountError
from jobs.benchmarks.data import Dataset, read_images
from jobs.benchmarks.peers import Task
from jobs.benchmarks.report import cost_per_million, print_figures, summary
from jobs.local_s3 import LocalS3Error
from tests.jobs.test_cli import cvt_label
from tests.makers import make_image

pytestmark = pytest.mark.slow

DATASET = Dataset(Path("tars"), Path("files"), 100, 8, 1000, 100, 0, "jpg")
OPTIONS = Options(
    images="",
    model="fashion-mnist",
    size=None,
    samples=None,
    rounds=1,
    peers=(),
    from_s3=False,
    batch_size=4,
    device="cpu",
    precision="fp32",
    cores=2,
    overrides=(),
    price_per_hour=None,
    timeout=60,
)


def test_a_million_images_cost_the_hours_that_they_take() -> None:
    assert cost_per_million(3.6, 1000) == pytest.approx(1.0)  # a thousand seconds
    assert cost_per_million(1.2, 20) == pytest.approx(1.2 * 50_000 / 3600)
    assert cost_per_million(None, 20) is None


def measured() -> dict[str, Any]:
    """Two rounds of a pipeline, a peer, one that failed, and one that isn't installed."""
    record = {"gpu_utilisation": 0.93, "decoder": "the GPU, 100 images, and the CPU, 0", "seconds": {}}
    runs = {
        "pipeline": [
            Run("pipeline", 100, 9.0, 20.0, 3.0, record=record, first_commit=4.0),
            Run("pipeline", 100, 9.0, 10.0, 5.0, record=record, first_commit=6.0),
        ],
        "ray": [Run("ray", 100, 9.0, 10.0, 6.0), Run("ray", 100, 9.0, 2.5, 8.0)],
        "dataloader": [Run("dataloader", 100, 9.0, 10.0), Run("dataloader", failure="killed")],
        "daft": [Run("daft", failure="not installed: pip install daft")],
    }
    alone = [{"read": 1000.0, "decode": 16.0, "engine": 20.0}, {"read": 5.0, "decode": 40.0, "engine": 12.5}]
    return summary(DATASET, alone, runs, 1.0)


def test_ratios_are_taken_round_by_round() -> None:
    found = measured()
    assert found["contenders"]["ray"]["ratios"] == [2.0, 4.0]
    assert (found["of_engine"], found["of_slowest_stage"]) == ([1.0, 0.8], [1.25, 2.0])
    assert found["contenders"]["pipeline"]["cost_per_million"] == pytest.approx(1e6 / 15 / 3600)
    assert [found["contenders"][name]["rate"] for name in ("dataloader", "daft")] == [None, None]
    assert found["contenders"]["daft"]["failure"] == "not installed: pip install daft"
    json.dumps(found)


def test_start_up_the_gpu_and_the_decoder_are_in_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured()
    assert [found["contenders"][name]["first_labels"] for name in ("pipeline", "ray")] == [[3, 5], [6, 8]]
    assert found["first_commit"] == [4, 6]
    assert found["gpu_utilisation"] == [0.93, 0.93]
    print_figures(found)
    printed = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in printed.splitlines() if "Ray Data" in line]
    assert rows[0][3:6] == ["100", "9.0", "7.0"]
    assert "DataLoader, transformers: killed" in printed
    assert "our first shard was committed 5.0 s after the command" in printed
    assert "decoded by: the GPU, 100 images, and the CPU, 0" in printed
    assert "GPU utilisation: 93%" in printed


def test_without_a_gpu_nothing_is_said_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    runs = {"pipeline": [Run("pipeline", 100, 9.0, 20.0, 3.0, in_s3=True, record={}, first_commit=4.0)]}
    found = summary(DATASET, [{"engine": 20.0}], runs, None)
    assert found["gpu_utilisation"] == [None]
    print_figures(found)
    printed = capsys.readouterr().out
    assert ("GPU" in printed, "decoded by" in printed, "this pipeline (S3)" in printed) == (
        False,
        False,
        True,
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [(WrongCountError("lost"), 1), (ContenderError("failed"), 1), (LocalS3Error("not installed"), 4)],
)
def test_what_leaves_no_figures_ends_with_a_status(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, _failures_told():
        raise error
    assert ended.value.code == status
    assert capsys.readouterr().err == f"cvt-label: {error}\n"


def test_a_small_benchmark_counts_compares_and_writes_json(images: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    data = ["--images", images, "--model", "fashion-mnist", "--samples", 60]
    how = ["--rounds", 1, "--batch-size", 4, "--device", "cpu", "--peers", "dataloader"]
    more = [
        "--set",
        "output.topk=1",
        "--set",
        "read.chunk_images=8",
        "--price-per-hour",
        2,
        "--output",
        figures,
    ]
    done = cvt_label("benchmark", *data, *how, *more)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["data"] == {
        "images": 60,
        "shards": found["data"]["shards"],
        "bytes": 12 * sum(len(make_image(i, format="PNG")) for i in range(5)),
        "distinct": 5,
        "left_out": 1,
        "extension": "png",
    }
    assert found["settings"]["batch_size"] == 4
    assert {"machine", "versions", "stages", "bound_by", "timings", "of_slowest_stage"} < set(found)
    assert set(found["alone"][0]) == {"read", "decode", "engine"}
    assert set(found["contenders"]) == {"pipeline", "dataloader"}
    for contender in found["contenders"].values():
        assert (contender["failure"], contender["images"]) == (None, 60)
        assert contender["rate"] == contender["rates"][0] > 0
        assert 0 < contender["first_labels"][0] < contender["seconds"][0]
        assert contender["cost_per_million"] == pytest.approx(2 / contender["rate"] / 3600 * 1e6)
    pipeline, peer = found["contenders"]["pipeline"], found["contenders"]["dataloader"]
    assert peer["ratios"] == [pytest.approx(pipeline["rate"] / peer["rate"])]
    assert pipeline["first_labels"][0] <= found["first_commit"][0] < pipeline["seconds"][0]
    assert found["decoder"] == ["the CPU, exact"]
    assert "DataLoader, transformers" in done.stdout
    assert "to the slowest stage alone" in done.stdout


def test_from_s3_is_for_the_pipeline_and_its_stages_alone(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: dict[str, list[bytes]] = {}

    def measure_alone(task: Task, timeout: float) -> dict[str, float]:
        reads["alone"] = [*read_images(task.tars)]
        assert task.tars.startswith("s3:")
        return {"engine": 1.0}

    def run_contender(name: str, task: Task, count: int, timeout: float) -> Run:
        reads[name] = [*read_images(task.tars)]
        assert task.tars.startswith("s3:") == task.output.startswith("s3:") == (name == "pipeline")
        return Run(name, count, 1.0, 1.0, 1.0, first_commit=1.0)

    monkeypatch.setattr("jobs.benchmarks.alone.measure_alone", measure_alone)
    monkeypatch.setattr("jobs.benchmarks.contenders.run_contender", run_contender)
    with mock.patch.dict(os.environ):
        _measure(replace(OPTIONS, images=str(images), peers=("ray",), from_s3=True))
    encoded = [make_image(i, format="PNG") for i in range(5)]
    assert reads == {"alone": encoded, "pipeline": encoded, "ray": encoded}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "ray,spark"], "spark: not one of"),
        (["--model", "fashion-mnist", "--size", "224"], "has a size of its own"),
        (["--set", "decode.nothing=1", "--model", "fashion-mnist"], "decode.nothing: unknown field"),
    ],
)
def test_what_cannot_be_measured_is_told_at_once(images: Path, arguments: list[str], message: str) -> None:
    done = cvt_label("benchmark", "--images", images, *arguments)
    assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (2, True, False)
