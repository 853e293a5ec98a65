"""Any object by its URI, whichever service holds it."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from pipeline.storage.local import LocalFiles
from pipeline.storage.objects import ObjectInfo, S3Access, StorageError
from pipeline.storage.ranges import CHUNK_BYTES, RangeReader
from pipeline.storage.uris import normalised

_AHEAD_BUFFER_BYTES = 1024**2

_MAX_PUT_BYTES = 5 * 1024**3  # of one PUT, on S3 and on Google Cloud Storage


_clients_lock = threading.Lock()  # making boto3 clients is not thread-safe, using them is


class _Service(Protocol):
    """What a storage service must offer; URIs are normalised by `Storage`."""

    def list(self, uri: str) -> Iterator[ObjectInfo]: ...

    def folders(self, uri: str) -> Iterator[str]: ...

    def stat(self, uri: str) -> ObjectInfo: ...

    def open(self, info: ObjectInfo) -> RangeReader: ...

    def write(self, uri: str, data: BinaryIO, expected: str | None) -> ObjectInfo: ...

    def delete(self, uri: str, expected: str | None) -> None: ...


@dataclass(frozen=True)
class Storage:
    """Access to every storage service, by URI.

    Small and picklable: the clients are made when first needed, one per process and configuration.
    Credentials come from each service's standard chain (environment, files, instance roles).

    Attributes:
        endpoint_url: An S3-compatible service; default: AWS, or what AWS_ENDPOINT_URL_S3 says.
        region: The buckets' region; default: what the AWS configuration says.
    """

    endpoint_url: str | None = None
    region: str | None = None

    def s3_access(self) -> S3Access:
        """How S3 is reached now, for other clients.

        Raises:
            StorageError: the client can't be made, or credentials can't be found.
        """
        from pipeline.storage.s3 import S3

        service = self._service("s3://")
        assert isinstance(service, S3)
        return service.access()

    def sweep(self, uri: str) -> None:
        """Removes what killed writers have left below the folder `uri`; in a bucket that is nothing.

        Raises:
            StorageError: it can't be removed.
        """
        uri = normalised(uri)
        service = self._service(uri)
        if isinstance(service, LocalFiles):
            service.sweep(uri)

    def connect(self, uri: str) -> None:
        """Makes the client that serves a URI, which takes a second; else its first use in a process does.

        Raises:
            StorageError: the client can't be made.
        """
        self._service(normalised(uri))

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        """Lists the object `uri`, or everything below the folder `uri`.

        A folder holds what is below `uri + "/"`, never a sibling whose name merely starts alike. The
        order is that of the service: bytewise on S3, Google Cloud Storage and local disks. Zero-byte
        markers of folders are left out. Streams: a page, or one local folder, is held at a time.

        Raises:
            ObjectNotFound: no such bucket or local folder. A prefix without objects is just empty.
            StorageError: any other failure.
        """
        uri = normalised(uri)
        return self._service(uri).list(uri)

    def folders(self, uri: str) -> Iterator[str]:
        """Lists the URIs of the folders directly below the folder `uri`.

        Raises:
            ObjectNotFound: no such bucket or local folder. A prefix without objects is just empty.
            StorageError: any other failure.
        """
        uri = normalised(uri)
        return self._service(uri).folders(uri)

    def stat(self, uri: str) -> ObjectInfo:
        """Looks up one object; raises `ObjectNotFound` if there is none."""
        uri = normalised(uri)
        return self._service(uri).stat(uri)

    def open(self, uri: str, version: str | None = None) -> io.BufferedReader:
        """Opens an object for reading, seekable, by ranged reads of 8 MiB that are retried.

        Every read is pinned to `version`, or to the current one: bytes of two versions never mix. With
        a version nothing is fetched before the first read, so a missing object is noticed there.

        Raises:
            ObjectNotFound, ObjectChanged, StorageError: here or from any read.
        """
        return io.BufferedReader(self.open_raw(uri, version), buffer_size=CHUNK_BYTES)

    def open_ahead(self, uri: str, version: str, at_once: int) -> io.BufferedReader:
        """As `open`, for reading from start to end: as many ranges as `at_once` are fetched at a time.

        A local file is read ahead by the operating system.
        """
        uri = normalised(uri)
        service = self._service(uri)
        raw = service.open(_pinned(uri, version))
        if isinstance(service, LocalFiles):
            return io.BufferedReader(raw, buffer_size=CHUNK_BYTES)
        return io.BufferedReader(raw.ahead(at_once), buffer_size=_AHEAD_BUFFER_BYTES)

    def open_raw(self, uri: str, version: str | None = None) -> io.RawIOBase:
        """As `open`, but each read fetches what it asks for: for callers that buffer themselves."""
        uri = normalised(uri)
        service = self._service(uri)
        info = service.stat(uri) if version is None else _pinned(uri, version)
        return service.open(info)

    def read(self, uri: str, version: str | None = None) -> bytes:
        """Reads a whole object; see `open`."""
        with self.open_raw(uri, version) as stream:
            data = stream.read()
        return data if data is not None else b""

    def write(self, uri: str, data: bytes | BinaryIO, expected: str | None = None) -> ObjectInfo:
        """Writes a whole object in one atomic step: readers see the old one or the new one.

        Args:
            uri: the object.
            data: its content, as bytes or as a seekable file.
            expected: the version that is to be replaced, or `ABSENT`; None replaces any. Of writers
                that expect the same, one succeeds.

        Raises:
            ObjectChanged: the object is not as expected. Where an answer was lost and the write was
                tried again, it may be this very write that changed it: look what is there.
            StorageError: the object is not written (or, after a lost answer, whole all the same).
        """
        uri = normalised(uri)
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        size = file.seek(0, os.SEEK_END)
        if size > _MAX_PUT_BYTES:
            raise StorageError(uri, f"{size} bytes are more than one PUT can hold (5 GiB)")
        return self._service(uri).write(uri, file, expected)

    def delete(self, uri: str, expected: str | None = None) -> None:
        """Removes an object, if it is there.

        Args:
            uri: the object.
            expected: the version that is to be removed; None removes any.

        Raises:
            ObjectChanged: the object is there, and not as expected.
            StorageError: the object is not removed (or, after a lost answer, is all the same).
        """
        uri = normalised(uri)
        self._service(uri).delete(uri, expected)

    def _service(self, uri: str) -> _Service:
        """The service that holds `uri`; its library, which takes a while, is imported when first needed."""
        scheme = uri.partition("://")[0] if "://" in uri else ""
        if scheme == "":
            return LocalFiles()
        if scheme not in ("s3", "gs"):
            shown = uri.partition("?")[0]  # behind it, a signed web address has its signature
            raise StorageError(shown, f"{scheme}:// is not supported (s3://, gs:// and local paths are)")
        with _clients_lock, _errors_of(uri):
            return _s3(self.endpoint_url, self.region) if scheme == "s3" else _gcs()


def _s3(endpoint_url: str | None, region: str | None) -> _Service:
    from pipeline.storage.s3 import connected

    environment = tuple(sorted(x for x in os.environ.items() if x[0].startswith("AWS_")))
    return connected(endpoint_url, region, environment, os.getpid())


def _gcs() -> _Service:
    try:
        from pipeline.storage.gcs import connected
    except ImportError as error:
        cause = "gs:// needs the Google Cloud Storage client: pip install 'cvt-label[gcs]'"
        raise StorageError("gs://", cause) from error
    return connected(os.environ.get("STORAGE_EMULATOR_HOST"), os.getpid())


@contextlib.contextmanager
def _errors_of(uri: str) -> Iterator[None]:
    """Names the URI in a failure to make a client, which serves all URIs."""
    try:
        yield
    except StorageError as error:
        raise type(error)(uri, error.cause) from error


def _pinned(uri: str, version: str) -> ObjectInfo:
    return ObjectInfo(uri, int(version.rpartition("-")[2]), version)
