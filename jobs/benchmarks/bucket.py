"""The bucket of the end-to-end benchmark."""

from __future__ import annotations

import os
import secrets
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jobs.local_s3 import LocalS3
from pipeline.storage import Storage

_CONCURRENT_WRITES = 16


@contextmanager
def open_folder(uri: str | None) -> Iterator[str]:
    """Yields the URI of a new folder in a bucket, under `uri`, and deletes the folder at the end.

    None: in a bucket of a local S3 server. The environment then selects the server, for this process and all
    processes that it starts.
    """
    with ExitStack() as stack:
        if uri is None:
            server = stack.enter_context(LocalS3())
            os.environ.update(server.environment())
            server.create_bucket("benchmark")
            yield "s3://benchmark"  # deleted with the server
            return
        folder = f"{uri.rstrip('/')}/benchmark-{secrets.token_hex(4)}"
        try:
            yield folder
        finally:
            for info in Storage().list(folder):
                Storage().delete(info.uri)


def upload(folder: Path, uri: str, with_files: bool) -> None:
    """Writes the tars of a local folder to `uri`/tars, and on request their members to `uri`/files."""

    def write(name: str, content: bytes) -> None:
        Storage().write(f"{uri}/files/{name}", content)

    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            Storage().write(f"{uri}/tars/{path.name}", file)
        if with_files:
            with tarfile.open(path) as tar, ThreadPoolExecutor(_CONCURRENT_WRITES) as pool:
                members = [(each.name, tar.extractfile(each).read()) for each in tar]  # type: ignore[union-attr]
                list(pool.map(write, *zip(*members, strict=True)))
