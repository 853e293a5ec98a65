"""Local files as objects. A write replaces a file by a rename, so that readers always see a complete file."""

# ruff: noqa: D102 - `Storage` documents the methods

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

from pipeline.storage.objects import ABSENT, ObjectChanged, ObjectInfo, ObjectNotFound, StorageError
from pipeline.storage.ranges import RangeReader
from pipeline.storage.temporary import locked

#: Temporary files of running and crashed writes. The glob `**/*.parquet` must not match them.
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.tmp$")
#: The version of a listed file that cannot be opened by its URI, because its name is not UTF-8.
_NOT_UTF8 = "not UTF-8-0"


class LocalFiles:
    """Files of the operating system."""

    def list(self, uri: str, prefix: str) -> Iterator[ObjectInfo]:
        if prefix:
            uri, _, prefix = f"{uri.rstrip('/')}/{prefix}".rpartition("/")
        with _storage_errors(uri):
            found = Path(uri or "/").stat()
        if stat.S_ISDIR(found.st_mode):
            yield from _walk(uri or "/", frozenset({(found.st_dev, found.st_ino)}), prefix)
        elif prefix:
            return
        elif stat.S_ISREG(found.st_mode):
            yield _info(uri, found)
        else:
            raise StorageError(uri, "not a file or folder")

    def list_folders(self, uri: str) -> Iterator[str]:
        with _storage_errors(uri), contextlib.suppress(FileNotFoundError), os.scandir(uri) as scan:
            yield from sorted(entry.path for entry in scan if entry.is_dir())

    def stat(self, uri: str) -> ObjectInfo:
        with _storage_errors(uri):
            found = Path(uri).stat()
        if not stat.S_ISREG(found.st_mode):
            raise ObjectNotFound(uri, "not a file")
        return _info(uri, found)

    def open(self, info: ObjectInfo) -> RangeReader:
        if info.version == _NOT_UTF8:
            raise StorageError(info.uri, "the file's name is not UTF-8: rename the file")
        with _storage_errors(info.uri):
            descriptor = os.open(info.uri, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would block
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise StorageError(info.uri, "not a regular file")

        def fetch(start: int, stop: int) -> bytes:
            with _storage_errors(info.uri):
                parts = []
                while start < stop and (part := os.pread(descriptor, stop - start, start)):
                    parts.append(part)
                    start += len(part)
                # Checked after the read, to detect a concurrent write.
                if _info(info.uri, os.fstat(descriptor)).version != info.version:
                    raise ObjectChanged(info.uri)
            return b"".join(parts)

        return RangeReader(info, fetch, close=functools.partial(os.close, descriptor))

    def write(self, uri: str, data: BinaryIO, expected: str | None) -> ObjectInfo:
        folder = Path(uri).parent
        with _storage_errors(uri):
            folder.mkdir(parents=True, exist_ok=True)
            with _temporary(folder) as (temporary, file):
                data.seek(0)
                shutil.copyfileobj(data, file)
                file.flush()
                os.fsync(file.fileno())
                with locked(folder) as descriptor:  # prevents other writes between the check and the rename
                    previous = None
                    with contextlib.suppress(FileNotFoundError):
                        previous = Path(uri).stat()
                    if expected not in (None, _info(uri, previous).version if previous else ABSENT):
                        raise ObjectChanged(uri)
                    # The file system's clock advances in milliseconds: two writes may have the same time.
                    if previous and temporary.stat().st_mtime_ns <= previous.st_mtime_ns:
                        os.utime(temporary, ns=(previous.st_atime_ns, previous.st_mtime_ns + 1))
                    found = temporary.stat()
                    temporary.replace(uri)
                    os.fsync(descriptor)  # otherwise a power failure may undo the rename
        return _info(uri, found)

    def delete(self, uri: str, expected: str | None) -> None:
        path = Path(uri)
        with _storage_errors(uri), contextlib.suppress(FileNotFoundError), locked(path.parent) as descriptor:
            if expected not in (None, _info(uri, path.stat()).version):
                raise ObjectChanged(uri)
            path.unlink()
            os.fsync(descriptor)

    def remove_unfinished_writes(self, uri: str) -> None:
        for folder, _, names in os.walk(uri):
            for path in (Path(folder, name) for name in filter(_UNFINISHED.match, names)):
                with contextlib.suppress(OSError), path.open("r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if the writer still runs
                    path.unlink()


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Creates a temporary file, which the block renames; removes the file if the block fails.

    The file is locked during the block. A lock ends with its process, so an unlocked temporary file belongs
    to a crashed writer.
    """
    while True:
        path = folder / f".{uuid.uuid4().hex}.tmp"
        with path.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not os.fstat(file.fileno()).st_nlink:
                continue  # another process removed the file before the lock
            try:
                yield path, file
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return


def _walk(folder: str, ancestors: frozenset[tuple[int, int]], prefix: str = "") -> Iterator[ObjectInfo]:
    """Yields the files under `folder` in bytewise order; follows links, except to an ancestor folder.

    Entries of `folder` whose name doesn't start with `prefix` are left out.
    """
    with _storage_errors(folder), os.scandir(folder) as scan:
        entries = [
            (os.fsencode(entry.name) + b"/" * _is_folder(entry), entry.path)
            for entry in scan
            if entry.name.startswith(prefix) and not _UNFINISHED.match(entry.name)
        ]
    for _, path in sorted(entries):
        found = None
        with contextlib.suppress(OSError):  # a link without a target, or a deleted file
            found = os.stat(path)  # noqa: PTH116 - creating a Path for each file is slow
        name = os.fsencode(path).decode(errors="backslashreplace")
        if found is not None and stat.S_ISDIR(found.st_mode):
            identity = (found.st_dev, found.st_ino)
            if identity not in ancestors:
                yield from _walk(path, ancestors | {identity})
        elif name != path:
            yield ObjectInfo(name, 0, _NOT_UTF8)
        elif found is not None and stat.S_ISREG(found.st_mode):
            yield _info(path, found)
        else:  # reading reports the cause
            yield ObjectInfo(path, 0, "0-0")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _info(path: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(path, found.st_size, f"{found.st_mtime_ns}-{found.st_size}")


@contextlib.contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    """Raises an OSError of the block as a `StorageError` with the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectNotFound(path, "no such file or folder") from error
    except FileExistsError as error:  # from creating the parent folders
        raise StorageError(path, "a parent folder of this path is a file") from error
    except OSError as error:
        raise StorageError(path, error.strerror or str(error)) from error
