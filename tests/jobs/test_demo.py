"""Tests of the command `demo`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.soak import descendants

pytestmark = pytest.mark.slow

DEMO = [sys.executable, "-m", "jobs.demo", "--output"]


def test_demo_labels_its_images_and_keeps_a_copy(tmp_path: Path) -> None:
    output = tmp_path / "labels"
    done = subprocess.run([*DEMO, output], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert "1,000 in 2 shards" in done.stdout
    assert "Ankle boot" in done.stdout
    assert "read from S3" in done.stdout
    [partition] = output.glob("model=fashion-mnist-*")
    labels = ds.dataset(partition / "predictions", format="parquet").to_table().to_pylist()
    assert len(labels) == len({row["key"] for row in labels}) == 1000
    hits = sum(row["label_id"] == row["target_id"] for row in labels)
    stats = pq.read_table(partition / "class_stats.parquet")
    assert sum(stats["true_positives"].to_pylist()) == hits
    assert hits >= 920
    assert (partition / "report.html").is_file()
    assert f"report: {partition}/report.html" in done.stdout


@pytest.mark.parametrize(
    ("number", "awaited"),
    [(signal.SIGTERM, "weed"), (signal.SIGINT, "ray::MapWorker")],
    ids=["SIGTERM before Ray", "Ctrl-C"],
)
def test_interrupt_stops_the_server_and_ray(tmp_path: Path, number: int, awaited: str) -> None:
    demo = subprocess.Popen(
        [*DEMO, tmp_path / "labels"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    started: dict[int, str] = {}
    deadline = time.monotonic() + 300
    while not any(awaited in command for command in started.values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        started |= descendants(demo.pid)
    demo.send_signal(number)
    assert demo.wait(300) == 130
    deadline = time.monotonic() + 120
    while (left := [started[pid] for pid in started if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
