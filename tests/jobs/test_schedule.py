"""Tests of the command `schedule`."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq

from jobs.schedule import schedule
from pipeline.config import ScheduleConfig, load_config
from pipeline.schedule import (
    DatasetState,
    StateFile,
)
from tests.command import invoke
from tests.makers import make_image, make_tar
from tests.pipeline.schedule.lists import DATASET, LIST
from tests.ray_head import REPOSITORY


def test_scheduler_labels_due_datasets_and_ends_at_sigterm(cluster: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(make_tar([(f"{i}.jpg", make_image(i)) for i in range(5)]))
    path = tmp_path / "schedule.yaml"
    text = LIST.format(address=cluster, python="python") + DATASET.format(name="a", folder=tmp_path)
    path.write_text(text.replace("submit: {", "submit: {poll_interval_s: 0.5, "))
    config = load_config(ScheduleConfig, path)
    dataset = config.datasets["a"]
    file = StateFile("a", dataset)
    file.write(DatasetState(dataset="a", handled_until=datetime.now(UTC) - timedelta(hours=2)))
    service = subprocess.Popen([sys.executable, "-m", "jobs.cli", "schedule", "--config", str(path)])
    try:
        deadline = time.monotonic() + 600
        while (state := file.read()) and not state.last_job:
            assert time.monotonic() < deadline
            assert service.poll() is None
            time.sleep(0.5)
    finally:
        service.send_signal(signal.SIGTERM)
    assert service.wait(60) == 0
    assert state is not None
    assert state.last_job is not None
    assert state.last_job.exit_status == 0
    (labels,) = tmp_path.glob("a/model=*/predictions/**/*.parquet")
    assert pq.read_metadata(labels).num_rows == 5
    invoke(schedule, "--config", path, "--once")  # nothing is due now


def test_status_prints_next_scheduled_times_and_what_cannot_be_read(bucket: str) -> None:
    set_output = ["--set", f"datasets.products.output.uri={bucket}/products"]
    other = ["--set", "datasets.reviews.output.uri=s3://no-such-bucket-here/reviews"]
    list_file = REPOSITORY / "configs" / "schedule.yaml"
    shown = invoke(schedule, "--config", list_file, "--status", *set_output, *other, status=4)
    lines = shown.output.splitlines()
    assert len(lines) == 8
    assert all(re.match(r"(products  |reviews   )next       20", line) for line in lines[:3] + lines[4:7])
    assert "02:00 Europe/Berlin" in lines[0]
    assert lines[3] == "products  not polled by a scheduler yet"
    assert lines[7].startswith("reviews   cannot be read: s3://no-such-bucket-here")


def test_invalid_list_ends_with_2_and_names_the_field(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text(LIST.format(address="http://head:8265", python="python") + "  a: {inputs: {uri: /x}}\n")
    shown = invoke(schedule, "--config", path, "--status", status=2)
    assert "datasets.a.inputs: unknown field" in shown.output
