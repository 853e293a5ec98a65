"""A Ray cluster of one node, started with `ray start`, with the Jobs API on its own port."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.soak import descendants

RAY = str(Path(sysconfig.get_path("scripts")) / "ray")
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Head:
    """A running cluster.

    Attributes:
        address: address of the dashboard.
        gcs_address: address for drivers.
        folder: folder of the logs.
        hub_token: a secret in the environment of the cluster, which no test needs.
    """

    address: str
    gcs_address: str
    folder: Path
    hub_token: str


class StartError(Exception):
    """The cluster did not start in time."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def ray_head(folder_of_log: Path) -> Iterator[Head]:
    """Starts a cluster with the environment of this process and the code as in a container image."""
    with contextlib.ExitStack() as stack:
        try:
            head = stack.enter_context(_started(folder_of_log / "ray.log"))
        except StartError:  # on a busy machine: Ray waits only 30 seconds
            head = stack.enter_context(_started(folder_of_log / "ray-again.log"))
        yield head


@contextlib.contextmanager
def _started(log: Path) -> Iterator[Head]:
    options = {name: _free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    # Sockets need a short path. The path also identifies the processes of this cluster.
    folder = tempfile.mkdtemp(prefix="ray-")
    hub_token = f"hf_{secrets.token_hex(16)}"
    environment = {
        # Jobs run the `python` that has the dependencies, as in a container image.
        "PATH": f"{Path(RAY).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "HF_TOKEN": hub_token,
        "RAY_metrics_report_interval_ms": "1000",
    }
    with log.open("wb") as output:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--num-cpus=4", "--include-dashboard=true"]
            + ["--node-ip-address=127.0.0.1", "--object-store-memory=200000000", f"--temp-dir={folder}"]
            + [f"--{name}={port}" for name, port in options.items()],
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{options['dashboard-port']}"
    try:
        _wait_for(address, head, log)
        yield Head(address, f"127.0.0.1:{options['port']}", Path(folder), hub_token)
    finally:
        # Agents have titles without the folder.
        for pid in [head.pid, *descendants(head.pid), *_processes_of(folder)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _processes_of(folder: str) -> list[int]:
    """Returns the processes that have the folder of the cluster in their command line."""
    found = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if folder in line]


def _wait_for(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(
        f"{address}/api/version", headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    )
    deadline = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(request, timeout=5)
            return
        except OSError:
            if time.monotonic() > deadline or head.poll() is not None:
                raise StartError(f"the cluster did not start:\n{log.read_text()[-2000:]}") from None
            time.sleep(0.5)
