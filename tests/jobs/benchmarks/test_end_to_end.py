"""The end-to-end benchmark: what it computes and prints, and a whole small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.benchmarks.end_to_end import compare_contenders, compare_stages, run
from jobs.benchmarks.runs import Run
from tests.command import invoke
from tests.makers import make_image


def test_contenders_are_compared_round_by_round() -> None:
    runs = {
        "pipeline": [Run(9.0, 20.0, 3.0, first_commit=4.0), Run(9.0, 10.0, 5.0, first_commit=6.0)],
        "ray": [Run(9.0, 10.0, 6.0), Run(9.0, 2.5, 8.0)],
        "dataloader": [Run(9.0, 10.0, 6.0), Run(failure="killed")],
        "daft": [Run(failure="No module named 'daft'")],
    }
    found = {one.contender: one for one in compare_contenders(runs, 3.6)}
    assert [found[name].ours_to_theirs for name in ("pipeline", "ray")] == [[1.0, 1.0], [2.0, 4.0]]
    assert [found[name].first_labels_s for name in ("pipeline", "ray")] == [[3.0, 5.0], [6.0, 8.0]]
    assert (found["pipeline"].first_commit_s, found["ray"].first_commit_s) == ([4.0, 6.0], [])
    assert found["dataloader"].failure == "killed"
    assert found["daft"].images_per_s == []
    assert found["daft"].cost_per_million is None
    # 3.6 an hour is a thousandth per second, and a million images take 1e6 / 15 seconds.
    assert found["pipeline"].cost_per_million == pytest.approx(1000 / 15)
    assert compare_contenders(runs, None)[0].cost_per_million is None


def test_stages_are_compared_round_by_round() -> None:
    alone = [{"read": 1000.0, "decode": 16.0, "engine": 20.0}, {"read": 5.0, "decode": 40.0, "engine": 12.5}]
    found = {one.stage: one.whole_job_to_stage for one in compare_stages(alone, [20.0, 10.0])}
    assert (found["engine"], found["slowest"]) == ([1.0, 0.8], [1.25, 2.0])


@pytest.mark.slow
def test_small_benchmark_counts_compares_and_writes_json(images: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    data = ["--images", images, "--model", "fashion-mnist", "--samples", 60]
    how = ["--rounds", 1, "--batch-size", 4, "--device", "cpu", "--peers", "dataloader,daft"]
    more = ["--set", "ray.address=in-process", "--set", "read.chunk_images=8", "--price-per-hour", 2]
    done = invoke(run, *data, *how, *more, "--output", figures)
    found = json.loads(figures.read_text())
    [dataset] = found["data"]
    assert (dataset["images"], dataset["distinct"], dataset["left_out"]) == (60, 5, 1)
    assert dataset["bytes"] == 12 * sum(len(make_image(i, format="PNG")) for i in range(5))
    assert found["settings"]["batch_size"] == 4
    assert {"machine", "versions", "stages_of_the_last_run"} < set(found)
    assert [one["stage"] for one in found["stages_alone"]] == ["read", "decode", "engine", "slowest"]
    pipeline, peer, _ = found["whole_jobs"]
    for contender in (pipeline, peer):
        assert contender["failure"] is None
        [rate] = contender["images_per_s"]
        assert 0 < contender["first_labels_s"][0] < contender["seconds"][0]
        assert contender["cost_per_million"] == pytest.approx(2 / rate / 3600 * 1e6)
    assert peer["ours_to_theirs"] == [pytest.approx(pipeline["images_per_s"][0] / peer["images_per_s"][0])]
    assert pipeline["first_labels_s"][0] <= pipeline["first_commit_s"][0] < pipeline["seconds"][0]
    assert found["last_run"][0]["decoder"] == "the CPU, exact"
    assert "dataloader" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "ray,spark"], "spark: not one of"),
        (["--model", "fashion-mnist", "--size", "224"], "has a size of its own"),
        (["--set", "decode.nothing=1", "--model", "fashion-mnist"], "decode.nothing: unknown field"),
    ],
)
def test_wrong_options_are_refused_at_once(images: Path, arguments: list[str], message: str) -> None:
    done = invoke(run, "--images", images, *arguments, status=2)
    assert message in " ".join(done.output.split())


def test_missing_images_end_with_4(tmp_path: Path) -> None:
    invoke(run, "--images", tmp_path, "--model", "fashion-mnist", status=4)
