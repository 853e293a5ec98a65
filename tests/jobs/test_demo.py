"""Tests of the command `demo`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.soak import descendants, is_running, listening_addresses

pytestmark = pytest.mark.slow

#: 127.0.0.1 in /proc/net/tcp, and as an IPv6 address in /proc/net/tcp6.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}
UV = [f"{sys.prefix}/bin/uv"]
DEMO = [sys.executable, "-m", "jobs.cli", "demo", "--output"]


def test_demo_labels_its_images_and_keeps_a_copy(tmp_path: Path) -> None:
    output = tmp_path / "labels"
    # Under `uv run`, Ray would pack this folder, and fail because of its size.
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 600 << 20)
    uv = [*UV, "run", "--no-project", "--active", "--offline", "--no-config"] if Path(UV[0]).exists() else []
    environment = {"VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [*uv, *DEMO, output],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
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
def test_interrupt_stops_the_server_and_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, awaited: str
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    demo = subprocess.Popen(
        [*DEMO, tmp_path / "labels"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    started: dict[int, str] = {}
    deadline = time.monotonic() + 300
    while not any(awaited in command for command in started.values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        started |= descendants(demo.pid)
    listening = listening_addresses(started)
    assert listening <= LOOPBACK
    assert listening or number == signal.SIGTERM  # the server may not listen yet
    sessions = {session_folder(command) for command in started.values() if "--session-dir=" in command}
    assert len(sessions) == (number == signal.SIGINT)
    for session in sessions:
        assert session.stat().st_mode & 0o777 == 0o700
        assert session.stat().st_uid == os.geteuid()
    demo.send_signal(number)
    assert demo.wait(300) == 130
    deadline = time.monotonic() + 120
    while (left := [started[pid] for pid in started if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    assert not any(session.exists() for session in sessions)


def session_folder(command: str) -> Path:
    """Returns the private folder of a local Ray from the command of one of its processes."""
    return Path(command.partition("--session-dir=")[2].split()[0]).parent.parent
