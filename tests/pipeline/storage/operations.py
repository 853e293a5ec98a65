"""Operations of `Storage` for the tests of failures, and a counter of retries."""

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


class RetryCounter:
    """Counts the retries in a block, by kind of failure."""

    def __enter__(self) -> RetryCounter:
        self._before = retry_counts()
        return self

    def __exit__(self, *_: object) -> None:
        self.counts = retry_counts() - self._before


def names(storage: Storage, uri: str) -> list[str]:
    return [info.uri for info in storage.list(uri)]
