"""The verbs of `Storage` as the tests of its failures call them, and what is counted meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.storage import ObjectInfo, Storage, retry_counts

OPERATIONS: dict[str, Callable[[Storage, ObjectInfo], Any]] = {
    "read": lambda storage, info: storage.read(info.uri, info.version),
    "write": lambda storage, info: storage.write(info.uri, b"some bytes"),
    "list": lambda storage, info: list(storage.list(info.uri.rpartition("/")[0])),
    "stat": lambda storage, info: storage.stat(info.uri),
    "delete": lambda storage, info: storage.delete(info.uri),
}


class Faults:
    """How many failures were tried again in the block, by kind."""

    def __enter__(self) -> Faults:
        self._before = retry_counts()
        return self

    def __exit__(self, *_: object) -> None:
        self.counts = retry_counts() - self._before


def names(storage: Storage, uri: str) -> list[str]:
    return [info.uri for info in storage.list(uri)]
