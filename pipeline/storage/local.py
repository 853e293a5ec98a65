"""Local files as objects: replaced by renaming, so that readers see them whole."""

# ruff: noqa: D102 - `Storage` describes the verbs

import contextlib
import fcntl
import functools
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.storage.objects import (
    ABSENT,
    NOT_AS_EXPECTED,
    NOT_AS_LISTED,
    ObjectChanged,
    ObjectInfo,
    ObjectNotFound,
    StorageError,
)
from pipeline.storage.ranges import RangeReader


class LocalFiles:
    """The service of the operating system."""

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        with _errors_of(uri):
            found = Path(uri).stat()
        if stat.S_ISDIR(found.st_mode):
            yield from _walk(uri, frozenset({(found.st_dev, found.st_ino)}))
        else:
            yield _info(uri, found)

    def list_folders(self, uri: str) -> Iterator[str]:
        with _errors_of(uri), contextlib.suppress(FileNotFoundError), os.scandir(uri) as scan:
            yield from sorted(entry.path for entry in scan if entry.is_dir())

    def stat(self, uri: str) -> ObjectInfo:
        with _errors_of(uri):
            found = Path(uri).stat()
        if not stat.S_ISREG(found.st_mode):
            raise ObjectNotFound(uri, "not a file")
        return _info(uri, found)

    def open(self, info: ObjectInfo) -> RangeReader:
        with _errors_of(info.uri):
            descriptor = os.open(info.uri, os.O_RDONLY)

        def fetch(start: int, stop: int) -> bytes:
            with _errors_of(info.uri):
                parts = []
                while start < stop and (part := os.pread(descriptor, stop - start, start)):
                    parts.append(part)
                    start += len(part)
                # Checked after the read, so that a concurrent write is noticed.
                if _info(info.uri, os.fstat(descriptor)).version != info.version:
                    raise ObjectChanged(info.uri, NOT_AS_LISTED)
            return b"".join(parts)

        return RangeReader(info, fetch, close=functools.partial(os.close, descriptor))

    def write(self, uri: str, data: BinaryIO, expected: str | None) -> ObjectInfo:
        folder = Path(uri).parent
        with _errors_of(uri):
            folder.mkdir(parents=True, exist_ok=True)
            with _temporary(folder) as (temporary, file):
                data.seek(0)
                shutil.copyfileobj(data, file)
                file.flush()
                os.fsync(file.fileno())
                with _locked(folder) as descriptor:  # no other write between the check and the rename
                    self._check(uri, expected, temporary)
                    found = temporary.stat()
                    temporary.replace(uri)
                    os.fsync(descriptor)  # else a power failure may undo the rename
        return _info(uri, found)

    def delete(self, uri: str, expected: str | None) -> None:
        path = Path(uri)
        with _errors_of(uri), contextlib.suppress(FileNotFoundError), _locked(path.parent) as descriptor:
            if expected not in (None, _info(uri, path.stat()).version):
                raise ObjectChanged(uri, NOT_AS_EXPECTED)
            path.unlink()
            os.fsync(descriptor)

    def remove_unfinished_writes(self, uri: str) -> None:
        with _errors_of(uri):
            for folder, _, names in os.walk(uri):
                for name in filter(_UNFINISHED.match, names):
                    _remove_if_left(Path(folder, name))

    def _check(self, uri: str, expected: str | None, temporary: Path) -> None:
        """Raises ObjectChanged if the file is not as expected; otherwise makes its successor newer."""
        former = None
        with contextlib.suppress(FileNotFoundError):
            former = Path(uri).stat()
        version = _info(uri, former).version if former else ABSENT
        if expected not in (None, version):
            raise ObjectChanged(uri, NOT_AS_EXPECTED)
        # Clocks of file systems tick every few milliseconds: two writes may fall together.
        if former and temporary.stat().st_mtime_ns <= former.st_mtime_ns:
            os.utime(temporary, ns=(former.st_atime_ns, former.st_mtime_ns + 1))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Runs the block while no other process holds the folder's lock; yields the folder's descriptor."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


#: Unfinished writes, and what crashes have left of them: no reader's `**/*.parquet` may ever match.
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.tmp$")


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Creates a file that the block renames; removes the file if the block fails.

    The file is locked meanwhile. A lock ends with its process, so an unlocked one is left from a crash.
    """
    while True:
        path = folder / f".{uuid.uuid4().hex}.tmp"
        with path.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not os.fstat(file.fileno()).st_nlink:
                continue  # somebody swept it before it was locked
            try:
                yield path, file
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return


def _remove_if_left(path: Path) -> None:
    """Removes a file that a crash has left, but not one that somebody is writing."""
    with contextlib.suppress(FileNotFoundError, PermissionError, BlockingIOError), path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[ObjectInfo]:
    """Files below `folder`, bytewise by path; links are followed, except back to a folder above."""
    with _errors_of(folder), os.scandir(folder) as scan:
        entries = [
            (os.fsencode(e.name) + b"/" * e.is_dir(), e.path) for e in scan if not _UNFINISHED.match(e.name)
        ]
    for _, path in sorted(entries):
        try:
            path.encode()
        except UnicodeEncodeError:
            raise StorageError(ascii(path), "the file's name is not UTF-8") from None
        try:
            with _errors_of(path):
                found = os.stat(path)  # noqa: PTH116 - a Path for each file takes too long
        except ObjectNotFound:  # a dead link, or just removed: reading it reports that
            yield ObjectInfo(path, 0, "0-0")
            continue
        identity = (found.st_dev, found.st_ino)
        if stat.S_ISREG(found.st_mode):
            yield _info(path, found)
        elif stat.S_ISDIR(found.st_mode) and identity not in above:
            yield from _walk(path, above | {identity})


def _info(path: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(path, found.st_size, f"{found.st_mtime_ns}-{found.st_size}")


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
    """Raises an OSError of the block as a `StorageError` of the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectNotFound(path, "no such file or folder") from error
    except OSError as error:
        raise StorageError(path, error.strerror or str(error)) from error
