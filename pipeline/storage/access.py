"""Access to objects on every storage service, by URI."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Generic, NamedTuple, TypeVar

from pipeline.storage.buckets import Buckets
from pipeline.storage.limits import RequestLimits
from pipeline.storage.local import LocalFiles
from pipeline.storage.objects import (
    ABSENT,
    ObjectChanged,
    ObjectInfo,
    ObjectNotFound,
    ObjectTooLarge,
    StorageError,
    unsupported_scheme,
)
from pipeline.storage.ranges import CHUNK_BYTES, RangeReader
from pipeline.storage.retrying import until_unchanged

if TYPE_CHECKING:  # imported on first use, as the services of buckets
    from pipeline.storage.http import Downloader

_AHEAD_BUFFER_BYTES = 1024**2  # small, because the ranges are in memory, and local files may be read in part
_MAX_READ_BYTES = 8 * 1024**3
_clients_lock = threading.Lock()  # boto3 clients are thread-safe, but their creation is not
_checked: set[tuple[object, ...]] = set()  # configurations and buckets whose conditional writes work
T = TypeVar("T")


class Versioned(NamedTuple, Generic[T]):
    """Content that was read from an object, and the object's version."""

    content: T
    version: str


@dataclass(frozen=True)
class Storage:
    """Access to every storage service, by normalized URI (see `normalize_uri`).

    Instances are small and picklable. A client is created on first use, one per process and configuration.
    Credentials come from each service's standard chain (environment, files, instance roles).
    Every method may raise `StorageError`, after retries. `StorageConfig` describes the fields.
    """

    endpoint_url: str | None = None
    region: str | None = None
    anonymous: bool = False
    requester_pays: bool = False
    request_timeout_s: float = 60.0
    min_bytes_per_s: float = 64 * 1024
    conditional_writes: bool = True

    def object_store_options(self, uri: str) -> dict[str, str]:
        """Returns options of Rust's object_store for a URI. The options contain secrets."""
        service = self._service(uri)
        if isinstance(service, LocalFiles):
            return {}
        return {"timeout": f"{self.request_timeout_s * 1000:.0f}ms"} | service.object_store_options()

    def list(self, uri: str, missing_ok: bool = True, prefix: str = "") -> Iterator[ObjectInfo]:
        """Lists the object `uri`, or all objects under the folder `uri`.

        With a `prefix` such as `2024/train-`, only objects whose name in the folder starts so are listed.

        Most stores list in bytewise order of the URIs. Zero-byte folder markers are skipped. The listing
        streams: memory holds one page, or the entries of one local folder. A missing folder in a bucket lists
        nothing, and a missing local folder raises `ObjectNotFound` unless `missing_ok`.
        """
        try:
            yield from self._service(uri).list(uri, prefix)
        except ObjectNotFound:
            if not missing_ok:
                raise

    def list_folders(self, uri: str) -> Iterator[str]:
        """Lists the URIs of the folders directly in a folder; none if the folder does not exist."""
        return self._service(uri).list_folders(uri)

    def stat(self, uri: str) -> ObjectInfo:
        """Returns an object's size and version; raises `ObjectNotFound` if the object does not exist."""
        return self._service(uri).stat(uri)

    def version(self, uri: str) -> str:
        """Returns an object's version, or `ABSENT` if the object does not exist."""
        try:
            return self.stat(uri).version
        except ObjectNotFound:
            return ABSENT

    def open(self, uri: str, version: str | None = None, read_ahead: int = 0) -> io.BufferedReader:
        """Opens an object as a seekable stream over retried ranged reads of 8 MiB.

        Every read is pinned to `version`, or to the current version: bytes of two versions never mix. If
        `version` is given, nothing is fetched before the first read. Of an object in a bucket, the next
        `read_ahead` ranges are fetched concurrently.
        """
        stream = self.open_unbuffered(uri, version)
        if read_ahead and "://" in uri:  # the operating system reads local files ahead
            stream = stream.with_read_ahead(read_ahead)
        return io.BufferedReader(stream, _AHEAD_BUFFER_BYTES if read_ahead else CHUNK_BYTES)

    def open_unbuffered(self, uri: str, version: str | None = None) -> RangeReader:
        """Opens an object as `open` does, but without a buffer: each read fetches exactly its range."""
        service = self._service(uri)
        return service.open(service.stat(uri) if version is None else ObjectInfo.of_version(uri, version))

    def read(self, uri: str, version: str | None = None, max_bytes: int = _MAX_READ_BYTES) -> bytes:
        """Reads a whole object at one version; raises `ObjectTooLarge` over `max_bytes`."""
        version = version or self.stat(uri).version
        _check_size(uri, version, max_bytes)
        with self.open_unbuffered(uri, version) as stream:
            return stream.read() or b""

    def read_latest(
        self, uri: str, read: Callable[[io.BufferedReader], T], max_bytes: int = _MAX_READ_BYTES
    ) -> Versioned[T] | None:
        """Returns the result of `read` on an open object and the version; None if there is no object.

        Restarts if the object is replaced during the read. Raises `StorageError` if the object has more than
        `max_bytes`, or if every attempt failed.
        """

        def attempt(version: str) -> Versioned[T] | None:
            if version == ABSENT:
                return None
            _check_size(uri, version, max_bytes)
            with self.open(uri, version) as file:
                return Versioned(read(file), version)

        return until_unchanged(uri, attempt, self.version)

    def downloader(self, concurrent_downloads: int = 64, downloads_per_host: int = 16) -> Downloader:
        """Returns a downloader of http(s) objects, with maximum numbers of requests, also to each host."""
        from pipeline.storage.http import Downloader

        limits = RequestLimits(self.request_timeout_s, self.min_bytes_per_s)
        return Downloader(limits, concurrent_downloads, downloads_per_host)

    def write(self, uri: str, data: bytes | BinaryIO, expected: str | None = None) -> ObjectInfo:
        """Writes a whole object in one atomic step: readers see the old object or the new one.

        Of concurrent writers that expect the same version, exactly one succeeds. The first conditional write
        to a bucket also shows whether the store checks conditions.

        Args:
            uri: URI of the object.
            data: The content; a file must be seekable.
            expected: The version to replace, or `ABSENT`; None replaces any version.

        Raises:
            ObjectChanged: The object does not have the expected version. The cause may be this write itself,
                if its first response was lost. Read the object to find out.
        """
        service = self._service(uri)
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        condition = self._condition(uri, expected)
        written = service.write(uri, file, condition)
        bucket = (self, *uri.split("/")[:3])
        if condition is not None and isinstance(service, Buckets) and bucket not in _checked:
            _check_conditions(service, uri, file, is_new=expected == ABSENT)
            _checked.add(bucket)
        return written

    def update(
        self, uri: str, change: Callable[[str], bytes | BinaryIO | None], expected: str | None = None
    ) -> ObjectInfo | None:
        """Replaces an object by compare-and-swap; restarts if another writer replaces the object meanwhile.

        Args:
            uri: URI of the object.
            change: Called with the object's version, or `ABSENT`. Returns the new content, or None to keep
                the object.
            expected: The version of the first attempt; default: the current version.

        Returns:
            The new object's metadata; None if `change` returned None.

        Raises:
            StorageError: Every attempt failed. An `ObjectChanged`: each time, another writer was faster.
        """

        def attempt(version: str) -> ObjectInfo | None:
            content = change(version)
            return None if content is None else self.write(uri, content, version)

        return until_unchanged(uri, attempt, self.version, expected)

    def delete(self, uri: str, expected: str | None = None) -> None:
        """Deletes an object, if it exists; raises `ObjectChanged` if it is not the expected version."""
        self._service(uri).delete(uri, self._condition(uri, expected, ABSENT))

    def remove_unfinished_writes(self, uri: str) -> None:
        """Deletes the temporary files of crashed writers under the folder `uri`; buckets have none."""
        service = self._service(uri)
        if isinstance(service, LocalFiles):
            service.remove_unfinished_writes(uri)

    def _condition(self, uri: str, expected: str | None, *accepted: str) -> str | None:
        """Returns the version to expect; checks the version now if the store lacks conditional writes."""
        if expected is None or self.conditional_writes or "://" not in uri:
            return expected
        if self.version(uri) not in (expected, *accepted):
            raise ObjectChanged(uri)
        return None

    def _service(self, uri: str) -> LocalFiles | Buckets:
        """Returns the service of a URI's scheme."""
        scheme, separator, _ = uri.partition("://")
        if not separator:
            return LocalFiles()
        if scheme not in ("s3", "gs"):
            raise unsupported_scheme(scheme)
        prefixes = ("AWS_", "GOOGLE_", "STORAGE_")
        environment = tuple(sorted(x for x in os.environ.items() if x[0].startswith(prefixes)))
        try:
            uri.encode()
            with _clients_lock:
                return _connect(scheme, self, environment, os.getpid())
        except UnicodeEncodeError:
            raise StorageError(ascii(uri), "the URI is not valid UTF-8") from None
        except StorageError as error:  # has no URI, because one client serves all URIs
            raise StorageError(uri, error.cause) from error


@functools.lru_cache(maxsize=8)
def _connect(scheme: str, storage: Storage, environment: tuple[tuple[str, str], ...], pid: int) -> Buckets:
    """Returns a service, one per process, configuration and environment; imports its library on first use."""
    del environment, pid
    limits = RequestLimits(storage.request_timeout_s, storage.min_bytes_per_s)
    access = storage.anonymous, storage.requester_pays
    if scheme == "s3":
        from pipeline.storage import s3

        return s3.connect(limits, storage.endpoint_url, storage.region, *access)
    try:
        from pipeline.storage.gcs import connect
    except ImportError as error:
        cause = "gs:// needs the Google Cloud Storage client: pip install 'cvt-label[gcs]'"
        raise StorageError("gs://", cause) from error
    return connect(limits, *access)


def _check_conditions(service: Buckets, uri: str, file: BinaryIO, is_new: bool) -> None:
    """Writes an existing object with false conditions; raises `StorageError` if the store ignores them."""
    try:
        for wrong in ("1-0", ABSENT):
            with contextlib.suppress(ObjectChanged):
                service.write(uri, file, wrong)
                cause = "the store ignores the conditions of writes: two runs could overwrite each other"
                remedy = "if only one run at a time writes here, set storage.conditional_writes to false"
                raise StorageError(uri, f"{cause}; {remedy}")
    except StorageError:
        if is_new:
            service.delete(uri, None)
        raise


def _check_size(uri: str, version: str, max_bytes: int) -> None:
    size = ObjectInfo.of_version(uri, version).size
    if size > max_bytes:
        raise ObjectTooLarge(
            uri, f"the object has {size:,} bytes, more than the limit of {max_bytes:,} bytes"
        )
