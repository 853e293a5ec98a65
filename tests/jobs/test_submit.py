"""The job as a cluster runs it: `ray job submit` against a Ray that was started by `ray start`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

REPOSITORY = Path(__file__).parents[2]
RAY = str(Path(sysconfig.get_path("scripts")) / "ray")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """The address of the dashboard of a running cluster."""
    options = {name: _free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    log = tmp_path / "ray.log"
    # Its own, and short: the sockets in it must have short names. It tells its processes from others' too.
    folder = tempfile.mkdtemp(prefix="ray-")
    with log.open("wb") as output:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--num-cpus=4", "--include-dashboard=true"]
            + ["--node-ip-address=127.0.0.1", "--object-store-memory=200000000", f"--temp-dir={folder}"]
            + [f"--{name}={port}" for name, port in options.items()],
            # The jobs' `python` is the one with the dependencies, as it is in a cluster's image.
            env=os.environ | {"PATH": f"{Path(RAY).parent}{os.pathsep}{os.environ['PATH']}"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{options['dashboard-port']}"
    try:
        _wait_for(address, head, log)
        yield address
    finally:
        for pid in [head.pid, *_processes_of(folder)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _processes_of(folder: str) -> list[int]:
    """The processes that have the cluster's folder in their command line."""
    found = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if folder in line]


def _wait_for(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(
        f"{address}/api/version", headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    )
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(request, timeout=5)
            return
        except OSError:
            if time.monotonic() > deadline or head.poll() is not None:
                raise AssertionError(f"the cluster did not start:\n{log.read_text()[-2000:]}") from None
            time.sleep(0.5)


def test_a_submitted_job_labels_on_the_cluster(cluster: str, tmp_path: Path) -> None:
    arguments = [
        "--set",
        f"input.uri={REPOSITORY}/jobs/data/fashion-mnist",
        "--set",
        f"output.uri={tmp_path}/out",
        "--set",
        "ray.address=null",
    ]
    job = ["python", "-m", "jobs.label", "--config", "configs/demo.yaml", *arguments]
    done = subprocess.run(
        [RAY, "job", "submit", "--address", cluster, "--working-dir", ".", "--", *job],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1,000 in 2 shards" in done.stdout
    files = list((tmp_path / "out").glob("model=*/predictions/**/*.parquet"))
    assert sum(pq.read_metadata(path).num_rows for path in files) == 1000
