"""Conditional writes, also to stores that lack them, and the loops around conditional requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, BinaryIO, TypeVar

from pipeline.storage.local import LocalFiles
from pipeline.storage.objects import ABSENT, ObjectChanged, ObjectInfo, ObjectNotFound, StorageError
from pipeline.storage.retrying import pause_after

T = TypeVar("T")

ATTEMPTS = 20  # of a loop; they take about two minutes
_proven: set[Hashable] = set()  # stores whose conditional writes were seen to work


def version_of(service: Any, uri: str) -> str:
    """Returns an object's version, or `ABSENT`."""
    try:
        return str(service.stat(uri).version)
    except ObjectNotFound:
        return ABSENT


def write_conditionally(
    service: Any, store: Hashable, uri: str, file: BinaryIO, expected: str | None
) -> ObjectInfo:
    """Writes an object in the expected version; raises `StorageError` if the store ignores conditions.

    After the first conditional write to a store, false conditions show whether the store checks conditions.
    """
    written: ObjectInfo = service.write(uri, file, expected)
    if expected is None or store in _proven or isinstance(service, LocalFiles):
        return written

    def is_refused(wrong: str) -> bool:
        try:
            service.write(uri, file, wrong)
        except ObjectChanged:
            return True
        return False

    try:
        # The second time, the object exists, even if another process had deleted it.
        if not is_refused("1-0") or not (is_refused(ABSENT) or is_refused(ABSENT)):
            cause = "the store ignores the conditions of writes: two runs could overwrite each other"
            remedy = "if only one run at a time writes here, set storage.conditional_writes to false"
            raise StorageError(uri, f"{cause}; {remedy}")
    except StorageError:  # also if the store has no such condition
        if expected == ABSENT:
            service.delete(uri, None)
        raise
    _proven.add(store)
    return written


def until_unchanged(
    service: Any, uri: str, action: Callable[[str], T], version: str | None, attempts: int
) -> T:
    """Calls `action` with the object's version until no other writer replaces the object meanwhile.

    `version` is the version of the first attempt; None for the current one.
    """
    number, versions = 0, set[str]()
    while True:
        try:
            number += 1
            current = version if number == 1 and version is not None else version_of(service, uri)
            if number > 1:  # the first version may be an old one
                versions.add(current)
            return action(current)
        except (ObjectChanged, ObjectNotFound) as error:
            if error.uri != uri:
                raise
            if number >= attempts and len(versions) == 1:
                cause = f"the store refused {number} requests for the version that the store reports"
                raise StorageError(uri, f"{cause}; the last one: {error.cause}") from error
            if number >= attempts:
                raise ObjectChanged(uri, f"failed in {number} attempts, last: {error.cause}") from error
        if number > 1:
            time.sleep(pause_after(number - 1))
