from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq

DEMO = [sys.executable, "-m", "jobs.demo", "--output"]


def test_the_demo_labels_its_sample_and_leaves_the_labels_in_a_folder(tmp_path: Path) -> None:
    output = tmp_path / "labels"
    done = subprocess.run([*DEMO, output], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "1,000 in 2 shards" in done.stdout
    assert "Ankle boot" in done.stdout
    assert "read back from S3" in done.stdout
    [partition] = output.glob("model=fashion-mnist-*")
    labels = ds.dataset(partition / "predictions", format="parquet").to_table().to_pylist()
    assert len(labels) == len({row["key"] for row in labels}) == 1000
    hits = sum(row["label_id"] == row["target_id"] for row in labels)
    stats = pq.read_table(partition / "class_stats.parquet")
    assert sum(stats["true_positives"].to_pylist()) == hits
    assert hits >= 920
    assert (partition / "report.html").is_file()


def test_ctrl_c_stops_the_server_and_everything_else(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [*DEMO, tmp_path / "labels"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert demo.stdout is not None
    assert "S3 server at" in demo.stdout.readline()
    servers = _children(demo.pid, "weed")
    assert servers
    demo.send_signal(signal.SIGINT)
    assert demo.wait(60) == 130
    assert not any(_runs(pid) for pid in servers)
    deadline = time.monotonic() + 20
    while (left := _session(demo.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def _children(parent: int, name: str) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(parent)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if name in line]


def _session(leader: int) -> list[str]:
    found = subprocess.run(["ps", "-o", "pid=,args=", "-s", str(leader)], capture_output=True, text=True)
    return found.stdout.splitlines()


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
