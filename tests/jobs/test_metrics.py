"""Tests of the command `metrics`, and of the alert rules on these metrics."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from jobs.metrics import metrics
from pipeline.storage import Storage
from tests.command import invoke
from tests.partitions import make_predictions, write_partition
from tests.ray_head import REPOSITORY

RULES = REPOSITORY / "configs/prometheus/alerts.yaml"
START, END = "2026-11-29T02:00:00+00:00", "2026-11-29T03:30:00+00:00"
STARTED, ENDED = 1795917600.0, 1795923000.0


def write_runs(folder: Path, model: str = "model=m-ffffffff", runs: int = 1, **record: Any) -> None:
    """Writes a partition whose runs have this record, on the input `folder`/in."""
    record = {"config": {"input": {"uri": f"{folder}/in"}}, "started_at": START, "ended_at": END} | record
    predictions = make_predictions("/in/a.tar", ["coat"], [0])
    runs_of_shard = [{"/in/a.tar": predictions}] * runs
    write_partition(Storage(), f"{folder}/out/{model}", ["coat"], runs_of_shard, record)


def write_config(folder: Path, name: str = "job") -> Path:
    config = {"input": {"uri": f"{folder}/in"}, "model": {"path": "microsoft/cvt-13"}}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config | {"output": {"uri": f"{folder}/out"}}))
    return file


def parse(text: str) -> dict[str, float]:
    """Returns the values by name and the labels that are neither the dataset nor all shards."""
    return {
        " ".join(
            [
                sample.name.removeprefix("cvt_label_last_run_"),
                *(value for name, value in sample.labels.items() if name != "dataset" and value != "1/1"),
            ]
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_describe_the_last_run(tmp_path: Path) -> None:
    write_runs(tmp_path, images_per_s=12.5)
    assert parse(invoke(metrics, "--config", write_config(tmp_path)).stdout) == {
        "start_timestamp_seconds m-ffffffff": STARTED,
        "end_timestamp_seconds m-ffffffff": ENDED,
        "status m-ffffffff complete": 1,
        "images_per_second m-ffffffff": 12.5,
    }


def test_last_run_is_found_before_the_runs_of_other_datasets_with_the_same_output(tmp_path: Path) -> None:
    write_runs(tmp_path)
    [record] = (tmp_path / "out").glob("*/runs/*.json")
    other = record.read_text().replace(f"{tmp_path}/in", f"{tmp_path}/other")
    for i in range(50):
        (record.parent / f"9{i:03d}.json").write_text(other)
    assert (
        parse(invoke(metrics, "--config", write_config(tmp_path)).stdout)["status m-ffffffff complete"] == 1
    )


def test_active_or_killed_run_has_no_end(tmp_path: Path) -> None:
    write_runs(tmp_path, status="running")
    uri = next((tmp_path / "out").glob("*/runs/*.json"))
    uri.write_text(uri.read_text().replace(f', "ended_at": "{END}"', ""))
    assert parse(invoke(metrics, "--config", write_config(tmp_path)).stdout) == {
        "start_timestamp_seconds m-ffffffff": STARTED,
        "status m-ffffffff running": 1,
    }


@pytest.mark.parametrize("field", ["broken_limits", "broken_failure_limits"])
def test_complete_run_that_exceeds_a_limit_is_not_complete(tmp_path: Path, field: str) -> None:
    write_runs(tmp_path, **{field: ["psi 0.4 is more than gate.max_psi"]})
    found = parse(invoke(metrics, "--config", write_config(tmp_path)).stdout)
    assert [name for name in found if name.startswith("status")] == ["status m-ffffffff limit_exceeded"]


def test_last_run_is_the_latest_of_all_models_on_the_dataset(tmp_path: Path) -> None:
    write_runs(tmp_path, "model=old-00000000", runs=2)
    write_runs(tmp_path, "model=new-11111111", runs=3, status="failed")
    write_runs(tmp_path, "model=x-22222222", runs=4, config={"input": {"uri": f"{tmp_path}/other"}})
    (tmp_path / "out/model=new-11111111/class_stats.parquet").unlink()  # its first run failed
    found = parse(invoke(metrics, "--config", write_config(tmp_path)).stdout)
    assert "status new-11111111 failed" in found
    assert len(found) == 3


def write_shares(folder: Path, *runs: str) -> None:
    """Writes records of runs, such as `2/3 failed`, each a minute after the one before.

    A run such as `1/1 complete other` has another input than `in`.
    """
    place = folder / "out/model=m-ffffffff/runs"
    place.mkdir(parents=True)
    for minute, run in enumerate(runs):
        share, status, *name = run.split()
        uri = f"{folder}/{name[0] if name else 'in'}"
        config = {"input": {"uri": uri}, "run": {"share": None if share == "1/1" else share}}
        started = datetime.fromtimestamp(60 * minute, UTC).isoformat()
        record = {"config": config, "status": status, "started_at": started}
        (place / f"{minute:04d}.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("runs", "last"),
    [
        (["1/2 complete", "2/2 failed"], {"1/2 complete": 0, "2/2 failed": 1}),
        (["1/2 failed", "2/2 complete", "2/2 running"], {"1/2 failed": 0, "2/2 running": 2}),
        (["1/3 failed", "2/3 complete", "1/1 complete"], {"complete": 2}),
        (["1/1 complete", "1/2 complete"], {"complete": 0, "1/2 complete": 1}),
        (["1/1 failed", "1/2 complete", "2/2 complete"], {"1/2 complete": 1, "2/2 complete": 2}),
        (
            ["1/4 complete", "2/4 complete", "3/4 failed", "4/4 failed", "1/2 complete"],
            {"2/4 complete": 1, "4/4 failed": 3, "1/2 complete": 4},
        ),
        (
            ["1/1 complete", "5/97 failed", "5/97 complete", "1/127 complete"],
            {"complete": 0, "5/97 complete": 2, "1/127 complete": 3},
        ),
        (["1/1 complete", *(f"{i}/200 complete other" for i in range(1, 201))], {"complete": 0}),
    ],
    ids=[
        "shares",
        "share that did not run again",
        "whole dataset after shares",
        "share that has not run yet after the whole dataset",
        "shares after the whole dataset",
        "rerun with another division",
        "runs of divisions that are not compared",
        "run before many shares of another dataset",
    ],
)
def test_each_share_has_its_last_run(tmp_path: Path, runs: list[str], last: dict[str, int]) -> None:
    write_shares(tmp_path, *runs)
    found = parse(invoke(metrics, "--config", write_config(tmp_path)).stdout)
    expected = {f"status m-ffffffff {run}": 1 for run in last}
    expected |= {
        f"start_timestamp_seconds m-ffffffff {run.rpartition(' ')[0]}".strip(): 60 * minute
        for run, minute in last.items()
    }
    assert found == expected


def test_divisions_without_a_common_divisor_are_compared_at_once(tmp_path: Path) -> None:
    write_shares(tmp_path, "1/1 complete", "1/9973 complete", "1/9967 complete")
    found = parse(invoke(metrics, "--config", write_config(tmp_path)).stdout)
    assert [name for name in found if name.startswith("status")] == [
        "status m-ffffffff 1/9967 complete",
        "status m-ffffffff 1/9973 complete",
        "status m-ffffffff complete",
    ]


def test_share_without_a_run_is_unknown(tmp_path: Path) -> None:
    write_shares(tmp_path, "1/3 complete", "3/3 complete")
    done = invoke(metrics, "--config", write_config(tmp_path), status=4)
    assert f"{tmp_path}/in, share 2/3: {tmp_path}/out: has no record of a run" in done.stderr
    assert 'model="",share="2/3",status="unknown"} 1.0' in done.stdout


def test_share_that_did_not_run_is_found_among_many_shares(tmp_path: Path) -> None:
    night = [f"{index}/150 complete" for index in range(1, 151)]
    write_shares(tmp_path, *night, *night[1:], *night[1:])
    found = parse(invoke(metrics, "--config", write_config(tmp_path)).stdout)
    assert found["start_timestamp_seconds m-ffffffff 1/150"] == 0
    assert found["start_timestamp_seconds m-ffffffff 2/150"] == 60 * 299
    assert len(found) == 300


def test_schedule_reports_each_dataset_and_those_without_a_run(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
        write_config(folder)
    write_runs(folders[0])
    write_runs(folders[2], status="incomplete")
    datasets = {folder.name: yaml.safe_load((folder / "job.yaml").read_text()) for folder in folders}
    schedule = tmp_path / "schedule.yaml"
    schedule.write_text(yaml.safe_dump({"defaults": {"cron": "0 2 * * *"}, "datasets": datasets}))
    output = tmp_path / "cvt_label.prom"
    done = invoke(metrics, "--schedule", schedule, "--output", output, status=4)
    assert done.stdout == ""
    assert f"{folders[1]}/in, share 1/1: {folders[1]}/out: has no record of a run" in done.stderr
    text = output.read_text()
    assert text.count("# TYPE cvt_label_last_run_status gauge") == 1
    found = zip(folders, ("m-ffffffff", "", "m-ffffffff"), ("complete", "unknown", "incomplete"), strict=True)
    for folder, model, status in found:
        labels = f'dataset="{folder}/in",model="{model}",share="1/1",status="{status}"'
        assert f"cvt_label_last_run_status{{{labels}}} 1.0\n" in text
    assert list(tmp_path.glob("cvt_label.prom*")) == [output]  # no temporary file


# --- alert rules -----------------------------------------------------------------------------------


LABELS = 'dataset="d",model="m",share="2/3"'


def status_series(status: str) -> str:
    return f'cvt_label_last_run_status{{{LABELS},status="{status}"}}'


def alert_test(name: str, at: str, series: dict[str, str], *expected: dict[str, Any]) -> dict[str, Any]:
    return {
        "interval": "1m",
        "input_series": [
            {"series": key, "values": values} for key, values in (series and OTHER | series).items()
        ],
        "alert_rule_test": [{"eval_time": at, "alertname": name, "exp_alerts": list(expected)}],
    }


def firing(summary: str, description: str | None = None, **labels: str) -> dict[str, Any]:
    annotations = {"summary": summary} | ({} if description is None else {"description": description})
    own = {"dataset": "d", "model": "m", "share": "2/3", "severity": "warning"}
    return {"exp_labels": own | labels, "exp_annotations": annotations}


START_SERIES = f"cvt_label_last_run_start_timestamp_seconds{{{LABELS}}}"
END_SERIES = START_SERIES.replace("start", "end")
RATE = f"cvt_label_last_run_images_per_second{{{LABELS}}}"
#: Another share of the same dataset, for which no alert fires.
OTHER = {
    series.replace("2/3", "1/3"): values
    for series, values in {
        status_series("complete"): "1x5000",
        START_SERIES: "0+60x5000",
        END_SERIES: "0+60x5000",
        RATE: "100x5000",
    }.items()
}
REASON = "The run record and docs/reference/exit-statuses.md have the reason and the remedy."
SLOW = "Less than half of the median of 14 days. The run record names the stage that limited the run."


@pytest.mark.parametrize(
    "case",
    [
        *(
            alert_test(
                "CvtLabelRunFailed",
                "1h",
                {status_series(status): "1x100"},
                firing(f"The last run on d (share 2/3) has the status {status}", REASON, status=status),
            )
            for status in ("failed", "incomplete", "limit_exceeded", "interrupted", "aborted", "unknown")
        ),
        alert_test("CvtLabelRunFailed", "1h", {status_series("complete"): "1x100"}),
        alert_test("CvtLabelRunFailed", "1h", {status_series("running"): "1x100"}),
        alert_test("CvtLabelRunMissing", "25h", {START_SERIES: "0x2000"}),
        alert_test(
            "CvtLabelRunMissing",
            "27h",
            {START_SERIES: "0x2000"},
            firing("No run on d (share 2/3) for more than 26 hours"),
        ),
        alert_test(
            "CvtLabelRunMissing",
            "1h",
            {},
            {
                "exp_labels": {"severity": "warning"},
                "exp_annotations": {"summary": "No run on any dataset for more than 26 hours"},
            },
        ),
        alert_test("CvtLabelRunNotEnded", "7h", {START_SERIES: "0x1000"}),
        alert_test("CvtLabelRunNotEnded", "9h", {START_SERIES: "0x1000", END_SERIES: "3600x1000"}),
        alert_test(
            "CvtLabelRunNotEnded",
            "9h",
            {START_SERIES: "0x1000"},
            firing("The run on d (share 2/3) has not ended after 9h 0m 0s"),
        ),
        alert_test("CvtLabelRunSlow", "50h", {RATE: "100x2800 60x200"}),
        alert_test(
            "CvtLabelRunSlow",
            "50h",
            {RATE: "100x2800 40x200"},
            firing("The last run on d (share 2/3) was slow: 40 images/s", SLOW),
        ),
    ],
    ids=lambda case: case["alert_rule_test"][0]["alertname"],
)
def test_alert_fires_if_and_only_if_the_last_run_of_a_share_needs_attention(
    case: dict[str, Any], tmp_path: Path
) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": [case]}))
    done = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
