"""The connection to Ray: the address, the start of a local Ray, and its token."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pipeline.dataflow import ClusterError, check_reachable, ray_address
from pipeline.dataflow.ray_cluster import init_ray
from tests.soak import descendants, is_running


def test_address_comes_from_configuration_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_address(None) == "local"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert ray_address(None) == "10.0.0.1:6379"
    assert ray_address("auto") == "auto"


def test_address_without_a_numeric_port_is_rejected() -> None:
    with pytest.raises(ClusterError, match="the port is not a number"):
        check_reachable("10.0.0.1:port")


def test_ray_that_does_not_start_is_started_again_and_then_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    starts: list[str] = []

    def init(address: str, **options: object) -> None:
        starts.append(address)
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match=r"Ray does not start .* timed out .* --no-ray"):
        init_ray("local")
    assert starts == ["local", "local"]
    with pytest.raises(ClusterError, match=r"cannot use the Ray cluster at 10\.0\.0\.1:1: .* timed out"):
        init_ray("10.0.0.1:1")
    assert starts[2:] == ["10.0.0.1:1"]


START = """\
from jobs.console import exit_on_error
from pipeline.dataflow.ray_cluster import ray_cluster

@exit_on_error()
def start():
    with ray_cluster("local"):
        print("started")

start()
"""


CLUSTER_AND_LOCAL = """\
import os, sys
from types import SimpleNamespace

import ray

from pipeline.dataflow.ray_cluster import ray_cluster

ray.init = ray.shutdown = lambda **options: None
ray.remote = lambda **options: lambda function: SimpleNamespace(remote=lambda: None)
ray.get = lambda task, timeout: print("limit", timeout)
sys.modules["ray.data"] = ray  # its import takes seconds
for address in ("auto", "local", "auto", "local"):
    with ray_cluster(address):
        print(address, os.environ.get("RAY_AUTH_TOKEN", "none"))
"""


@pytest.mark.parametrize(
    "own",
    [{}, {"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN_PATH": "/missing"}],
)
def test_random_token_and_time_limit_are_those_of_a_local_ray(own: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER_AND_LOCAL],
        env=environment | {"HOME": "/missing", "PYTHONPATH": str(Path.cwd())} | own,
        capture_output=True,
        text=True,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    token = own.get("RAY_AUTH_TOKEN", "none")
    assert lines[0] == ["auto", token], done.stderr
    local = lines[2][1]
    assert local == token if own else re.fullmatch("[0-9a-f]{64}", local)
    repeated = [["limit", "50.0"], ["local", local]]
    assert lines[1:] == [*repeated, ["auto", local], *repeated]


@pytest.mark.slow
def test_interrupt_while_ray_starts_leaves_no_process_and_no_folder() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"}
        process = subprocess.Popen(
            [sys.executable, "-c", START],
            env=environment | {"TMPDIR": folder, "PYTHONPATH": str(Path.cwd())},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started: dict[int, str] = {}
        while not (raylets := [pid for pid, command in started.items() if "/raylet " in command]):
            assert process.poll() is None, process.communicate()
            started |= descendants(process.pid)
            time.sleep(0.02)
        os.kill(raylets[0], signal.SIGSTOP)  # the start can't succeed
        [session] = Path(folder).glob("cvt-label-tmp-*")
        assert session.stat().st_mode & 0o777 == 0o700
        started |= descendants(process.pid)
        time.sleep(3)  # Ray searches its node
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=25)  # Ray itself would wait for 30 s
        assert (process.returncode, stdout) == (130, ""), stderr
        assert not [path for path in Path(folder).iterdir() if path.name.startswith("cvt-label-tmp-")]
        deadline = time.monotonic() + 10
        while left := [command for pid, command in started.items() if is_running(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
