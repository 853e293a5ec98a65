"""Access to objects on every storage service, by URI."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Generic, TypeAlias, TypeVar

from pipeline.storage.conditional import ATTEMPTS, until_unchanged, version_of, write_conditionally
from pipeline.storage.limits import RequestLimits
from pipeline.storage.local import LocalFiles
from pipeline.storage.objects import (
    ABSENT,
    VERSION_MISMATCH,
    ObjectChanged,
    ObjectInfo,
    ObjectNotFound,
    StorageError,
)
from pipeline.storage.ranges import CHUNK_BYTES

if TYPE_CHECKING:
    from pipeline.storage.gcs import GoogleCloudStorage
    from pipeline.storage.s3 import S3

_AHEAD_BUFFER_BYTES = 1024**2
_MAX_READ_BYTES = 8 * 1024**3
_clients_lock = threading.Lock()  # boto3 clients are thread-safe, but their creation is not
_Service: TypeAlias = "LocalFiles | S3 | GoogleCloudStorage"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Versioned(Generic[T]):
    """Content that was read from an object, and the object's version."""

    content: T
    version: str


@dataclass(frozen=True)
class Storage:
    """Access to every storage service, by normalized URI (see `normalize_uri`).

    Instances are small and picklable. A client is created on first use, one per process and configuration.
    Credentials come from each service's standard chain (environment, files, instance roles).
    Every method may raise `StorageError`, after retries.

    Attributes:
        endpoint_url: URL of an S3-compatible service; default: AWS_ENDPOINT_URL_S3, or AWS.
        region: Region of the buckets; default: from the AWS configuration.
        request_timeout_s: Maximum seconds of a request, plus the time that its bytes need.
        min_bytes_per_s: Minimum throughput, which gives a request with many bytes more time.
        conditional_writes: Whether buckets support conditional writes. If false, there must be one writer.
    """

    endpoint_url: str | None = None
    region: str | None = None
    request_timeout_s: float = 60.0
    min_bytes_per_s: float = 64 * 1024
    conditional_writes: bool = True

    def object_store_options(self, uri: str) -> dict[str, str]:
        """Returns options of Rust's object_store for a URI. The options contain secrets."""
        if "://" not in uri:
            return {}
        options = {"timeout": f"{self.request_timeout_s * 1000:.0f}ms"}
        return options | (_s3(self).object_store_options() if uri.startswith("s3://") else {})

    def list(self, uri: str, missing_ok: bool = True) -> Iterator[ObjectInfo]:
        """Lists the object `uri`, or all objects under the folder `uri`.

        A folder contains the objects under `uri + "/"`, but no sibling with the same prefix. Most
        stores list in bytewise order of the URIs. Zero-byte folder markers are skipped. The listing streams:
        memory holds one page, or the entries of one local folder.

        Args:
            uri: URI of an object or a folder.
            missing_ok: Whether a missing local folder lists nothing. In a bucket, a missing folder always
                lists nothing, because buckets have no folders.

        Raises:
            ObjectNotFound: The local folder does not exist, and `missing_ok` is false.
        """
        try:
            yield from self._service(uri).list(uri)
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
        return version_of(self._service(uri), uri)

    def open(self, uri: str, version: str | None = None) -> io.BufferedReader:
        """Opens an object as a seekable stream over retried ranged reads of 8 MiB.

        Every read is pinned to `version`, or to the current version: bytes of two versions never mix. If
        `version` is given, nothing is fetched before the first read.
        """
        return io.BufferedReader(self.open_unbuffered(uri, version), buffer_size=CHUNK_BYTES)

    def open_sequential(self, uri: str, version: str, read_ahead: int) -> io.BufferedReader:
        """Opens an object for reading from start to end; fetches `read_ahead` ranges concurrently."""
        service = self._service(uri)
        raw = service.open(_pinned(uri, version))
        if isinstance(service, LocalFiles):  # the operating system reads ahead
            return io.BufferedReader(raw, buffer_size=CHUNK_BYTES)
        return io.BufferedReader(raw.with_read_ahead(read_ahead), buffer_size=_AHEAD_BUFFER_BYTES)

    def open_unbuffered(self, uri: str, version: str | None = None) -> io.RawIOBase:
        """Opens an object as `open` does, but without a buffer: each read fetches exactly its range."""
        service = self._service(uri)
        return service.open(service.stat(uri) if version is None else _pinned(uri, version))

    def read(self, uri: str, version: str | None = None, max_bytes: int = _MAX_READ_BYTES) -> bytes:
        """Reads a whole object at one version; raises `StorageError` if it has more than `max_bytes`."""
        version = version or self.stat(uri).version
        _check_size(uri, version, max_bytes)
        with self.open_unbuffered(uri, version) as stream:
            return stream.read() or b""

    def read_latest(
        self,
        uri: str,
        read: Callable[[io.BufferedReader], T],
        max_bytes: int = _MAX_READ_BYTES,
        attempts: int = ATTEMPTS,
    ) -> Versioned[T] | None:
        """Reads the current version of an object; restarts if the object is replaced during the read.

        Returns:
            The result of `read` on the open object, and the version; None if the object does not exist.

        Raises:
            StorageError: The object has more than `max_bytes`, or every attempt failed (`ObjectChanged` if
                other writers replaced the object each time).
        """

        def attempt(version: str) -> Versioned[T] | None:
            if version == ABSENT:
                return None
            _check_size(uri, version, max_bytes)
            with self.open(uri, version) as file:
                return Versioned(read(file), version)

        return until_unchanged(self._service(uri), uri, attempt, None, attempts)

    def write(self, uri: str, data: bytes | BinaryIO, expected: str | None = None) -> ObjectInfo:
        """Writes a whole object in one atomic step: readers see the old object or the new one.

        Of concurrent writers that expect the same version, exactly one succeeds.

        Args:
            uri: URI of the object.
            data: The content; a file must be seekable.
            expected: The version to replace, or `ABSENT`; None replaces any version.

        Raises:
            ObjectChanged: The object does not have the expected version. If the response to this write was
                lost and the write was retried, the write itself may have changed the object. Read the
                object to find out.
        """
        service, file = self._service(uri), io.BytesIO(data) if isinstance(data, bytes) else data
        expected = self._condition(service, uri, expected, expected)
        return write_conditionally(service, (self, *uri.split("/")[:3]), uri, file, expected)

    def update(
        self,
        uri: str,
        change: Callable[[str], bytes | BinaryIO | None],
        expected: str | None = None,
        attempts: int = ATTEMPTS,
    ) -> ObjectInfo | None:
        """Replaces an object by compare-and-swap; restarts if another writer replaces the object meanwhile.

        Args:
            uri: URI of the object.
            change: Called with the object's version, or `ABSENT`. Returns the new content, or None to keep
                the object.
            expected: The version of the first attempt; default: the current version.
            attempts: Maximum number of attempts.

        Returns:
            The new object's metadata; None if `change` returned None.

        Raises:
            StorageError: Every attempt failed (`ObjectChanged`: other writers replaced the object each time).
        """

        def attempt(version: str) -> ObjectInfo | None:
            content = change(version)
            return None if content is None else self.write(uri, content, version)

        return until_unchanged(self._service(uri), uri, attempt, expected, attempts)

    def delete(self, uri: str, expected: str | None = None) -> None:
        """Deletes an object, if the object exists: the `expected` version, or any version.

        Raises:
            ObjectChanged: The object exists, but does not have the expected version.
        """
        service = self._service(uri)
        service.delete(uri, self._condition(service, uri, expected, ABSENT))

    def remove_unfinished_writes(self, uri: str) -> None:
        """Deletes the temporary files of crashed writers under the folder `uri`; buckets have none."""
        service = self._service(uri)
        if isinstance(service, LocalFiles):
            service.remove_unfinished_writes(uri)

    def _condition(
        self, service: _Service, uri: str, expected: str | None, accepted: str | None
    ) -> str | None:
        """Returns the version to expect; checks the version now if the store lacks conditional writes."""
        if expected is None or self.conditional_writes or isinstance(service, LocalFiles):
            return expected
        if version_of(service, uri) not in (expected, accepted):
            raise ObjectChanged(uri, VERSION_MISMATCH)
        return None

    def _service(self, uri: str) -> _Service:
        """Returns the service of a URI's scheme."""
        scheme = uri.partition("://")[0]
        if scheme == uri:
            return LocalFiles()
        if scheme not in ("s3", "gs"):
            shown = uri.partition("?")[0]  # the query of a signed URL holds the signature
            raise StorageError(shown, f"{scheme}:// is not supported; use s3://, gs:// or a local path")
        try:
            return _s3(self) if scheme == "s3" else _gcs(self)
        except StorageError as error:  # has no URI, because one client serves all URIs
            raise type(error)(uri, error.cause) from error


# The library of a service is imported on first use.


def _s3(storage: Storage) -> S3:
    from pipeline.storage.s3 import S3, make_client

    environment = tuple(sorted(x for x in os.environ.items() if x[0].startswith("AWS_")))
    with _clients_lock:
        limits = RequestLimits(storage.request_timeout_s, storage.min_bytes_per_s)
        return S3(make_client(storage.endpoint_url, storage.region, limits, environment, os.getpid()))


def _gcs(storage: Storage) -> GoogleCloudStorage:
    try:
        from pipeline.storage.gcs import GoogleCloudStorage, make_client
    except ImportError as error:
        cause = "gs:// needs the Google Cloud Storage client: pip install 'cvt-label[gcs]'"
        raise StorageError("gs://", cause) from error
    with _clients_lock:
        limits = RequestLimits(storage.request_timeout_s, storage.min_bytes_per_s)
        emulator = os.environ.get("STORAGE_EMULATOR_HOST")
        return GoogleCloudStorage(make_client(limits, emulator, os.getpid()))


def _check_size(uri: str, version: str, max_bytes: int) -> None:
    size = _pinned(uri, version).size
    if size > max_bytes:
        cause = f"the object has {size:,} bytes, more than the limit of {max_bytes:,} bytes"
        raise StorageError(uri, f"{cause}; move the object to another place, and run the command again")


def _pinned(uri: str, version: str) -> ObjectInfo:
    return ObjectInfo(uri, int(version.rpartition("-")[2]), version)
