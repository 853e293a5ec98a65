"""Access to any object by its URI, on every storage service."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Generic, TypeAlias, TypeVar

from pipeline.storage.local import LocalFiles
from pipeline.storage.objects import ABSENT, ObjectChanged, ObjectInfo, ObjectNotFound, StorageError
from pipeline.storage.ranges import CHUNK_BYTES

if TYPE_CHECKING:
    from pipeline.storage.gcs import GoogleCloudStorage
    from pipeline.storage.s3 import S3

_AHEAD_BUFFER_BYTES = 1024**2
_clients_lock = threading.Lock()  # making boto3 clients is not thread-safe, using them is
_Service: TypeAlias = "LocalFiles | S3 | GoogleCloudStorage"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Versioned(Generic[T]):
    """What was read of an object, and the version that it was read from."""

    content: T
    version: str


@dataclass(frozen=True)
class Storage:
    """Access to every storage service, by URIs as `normalize_uri` returns them.

    Small and picklable: clients are made when first needed, one per process and configuration.
    Credentials come from each service's standard chain (environment, files, instance roles).
    Every method may raise `StorageError`, after retries.

    Attributes:
        endpoint_url: an S3-compatible service; default: AWS, or AWS_ENDPOINT_URL_S3.
        region: the buckets' region; default: from the AWS configuration.
    """

    endpoint_url: str | None = None
    region: str | None = None

    def object_store_options(self, uri: str) -> dict[str, str]:
        """Returns the options for a URI of libraries over Rust's object_store; they hold secrets."""
        return self._s3().object_store_options() if uri.startswith("s3://") else {}

    def list(self, uri: str, missing_ok: bool = True) -> Iterator[ObjectInfo]:
        """Lists the object `uri`, or everything under the folder `uri`; nothing if there is neither.

        A missing local folder raises `ObjectNotFound` unless `missing_ok`; in a bucket there are no folders.

        A folder holds what is under `uri + "/"`, never a sibling whose name merely starts alike. The
        order is the service's: bytewise on S3, Google Cloud Storage and local disks. Zero-byte
        markers of folders are left out. Streams: a page, or one local folder, is held at a time.
        """
        try:
            yield from self._service(uri).list(uri)
        except ObjectNotFound:
            if not missing_ok:
                raise

    def list_folders(self, uri: str) -> Iterator[str]:
        """Lists the folders directly in a folder, in no particular order; none if it does not exist."""
        return self._service(uri).list_folders(uri)

    def stat(self, uri: str) -> ObjectInfo:
        """Returns an object's size and version; raises `ObjectNotFound` if there is none."""
        return self._service(uri).stat(uri)

    def version(self, uri: str) -> str:
        """Returns an object's version, or `ABSENT`."""
        try:
            return self.stat(uri).version
        except ObjectNotFound:
            return ABSENT

    def open(self, uri: str, version: str | None = None) -> io.BufferedReader:
        """Opens an object for reading, seekable, by ranged reads of 8 MiB that are retried.

        Every read is pinned to `version`, or to the current one: bytes of two versions never mix. With
        a version nothing is fetched before the first read.
        """
        return io.BufferedReader(self.open_unbuffered(uri, version), buffer_size=CHUNK_BYTES)

    def open_sequential(self, uri: str, version: str, at_once: int) -> io.BufferedReader:
        """As `open`, for reading from start to end: fetches `at_once` ranges at a time."""
        service = self._service(uri)
        raw = service.open(_pinned(uri, version))
        if isinstance(service, LocalFiles):  # the operating system reads ahead
            return io.BufferedReader(raw, buffer_size=CHUNK_BYTES)
        return io.BufferedReader(raw.ahead(at_once), buffer_size=_AHEAD_BUFFER_BYTES)

    def open_unbuffered(self, uri: str, version: str | None = None) -> io.RawIOBase:
        """As `open`, but each read fetches what it asks for: for callers that buffer themselves."""
        service = self._service(uri)
        return service.open(service.stat(uri) if version is None else _pinned(uri, version))

    def read(self, uri: str, version: str | None = None) -> bytes:
        """Reads a whole object; see `open`."""
        with self.open_unbuffered(uri, version) as stream:
            return stream.read() or b""

    def read_latest(
        self, uri: str, read: Callable[[io.BufferedReader], T], attempts: int = 100
    ) -> Versioned[T] | None:
        """Reads the current version of an object; starts again if somebody replaces the object meanwhile.

        Returns what `read` made of the open object, and the version; None if there is no such object.

        Raises:
            ObjectChanged: the object was replaced during every attempt.
        """
        while True:
            attempts -= 1
            try:
                version = self.stat(uri).version
                with self.open(uri, version) as file:
                    return Versioned(read(file), version)
            except ObjectNotFound:
                return None
            except ObjectChanged:
                if not attempts:
                    raise

    def write(self, uri: str, data: bytes | BinaryIO, expected: str | None = None) -> ObjectInfo:
        """Writes a whole object in one atomic step: readers see the old one or the new one.

        The version to replace is `expected`, which may be `ABSENT`; None replaces any. Of writers that expect
        the same version, one succeeds. A file must be seekable.

        Raises:
            ObjectChanged: the object is not as expected. If an answer was lost and the write was
                retried, this very write may have changed it: look what is there.
        """
        return self._service(uri).write(uri, io.BytesIO(data) if isinstance(data, bytes) else data, expected)

    def update(
        self,
        uri: str,
        change: Callable[[str], bytes | BinaryIO | None],
        expected: str | None = None,
        attempts: int = 100,
    ) -> ObjectInfo | None:
        """Replaces an object by compare-and-swap; starts again if somebody else replaces it meanwhile.

        `change` is called with the object's version, or `ABSENT`. It reads what it needs of that version, and
        returns the new content, or None to leave the object as it is: then None is returned here, too. The
        first version is `expected`, if given.

        Raises:
            ObjectChanged: the object was replaced during every attempt.
        """
        while True:
            try:
                version = self.version(uri) if expected is None else expected
                content = change(version)
                return None if content is None else self.write(uri, content, version)
            except (ObjectChanged, ObjectNotFound) as error:
                attempts -= 1
                if attempts < 1 or error.uri != uri:
                    raise
                expected = None

    def delete(self, uri: str, expected: str | None = None) -> None:
        """Deletes an object, if it exists: the `expected` version, or any.

        Raises:
            ObjectChanged: the object exists, and is not as expected.
        """
        self._service(uri).delete(uri, expected)

    def remove_unfinished_writes(self, uri: str) -> None:
        """Deletes what killed writers have left under the folder `uri`; in a bucket that is nothing."""
        service = self._service(uri)
        if isinstance(service, LocalFiles):
            service.remove_unfinished_writes(uri)

    def _service(self, uri: str) -> _Service:
        """Returns the service that holds `uri`."""
        scheme = uri.partition("://")[0]
        if scheme == uri:
            return LocalFiles()
        if scheme not in ("s3", "gs"):
            shown = uri.partition("?")[0]  # behind it, a signed web address has its signature
            raise StorageError(shown, f"{scheme}:// is not supported (s3://, gs:// and local paths are)")
        try:
            return self._s3() if scheme == "s3" else self._gcs()
        except StorageError as error:  # names no URI, since one client serves all
            raise type(error)(uri, error.cause) from error

    # A service's library is imported when first needed.

    def _s3(self) -> S3:
        from pipeline.storage.s3 import S3, make_client

        environment = tuple(sorted(x for x in os.environ.items() if x[0].startswith("AWS_")))
        with _clients_lock:
            return S3(make_client(self.endpoint_url, self.region, environment, os.getpid()))

    def _gcs(self) -> GoogleCloudStorage:
        try:
            from pipeline.storage.gcs import GoogleCloudStorage, make_client
        except ImportError as error:
            cause = "gs:// needs the Google Cloud Storage client: pip install 'cvt-label[gcs]'"
            raise StorageError("gs://", cause) from error
        with _clients_lock:
            return GoogleCloudStorage(make_client(os.environ.get("STORAGE_EMULATOR_HOST"), os.getpid()))


def _pinned(uri: str, version: str) -> ObjectInfo:
    return ObjectInfo(uri, int(version.rpartition("-")[2]), version)
