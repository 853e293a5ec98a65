"""Object storage: s3://, gs:// and local files behind four verbs (list, open, stat, write).

The only module that talks to a storage service. Not a file system: objects are written whole, in one
atomic step, and read at a pinned version.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import os
import random
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote

import boto3
import botocore.exceptions
import urllib3.exceptions
from botocore.config import Config

_CHUNK_BYTES = 8 * 1024**2  # one ranged GET; what an open object holds in memory
_READ_ATTEMPTS = 5
_BACKOFF_SECONDS = 0.25
_CHANGED = "the object is no longer the version that was listed"
_MAX_PUT_BYTES = 5 * 1024**3  # of one PUT, on S3 and on Google Cloud Storage

T = TypeVar("T")


class StorageError(Exception):
    """A permanent failure, after retries; the message names the URI and the cause.

    Attributes:
        uri: The object's, folder's or bucket's URI.
        cause: The message without the URI.
    """

    def __init__(self, uri: str, cause: str) -> None:
        super().__init__(uri, cause)
        self.uri = uri
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.uri}: {self.cause}"


class ObjectNotFound(StorageError):  # noqa: N818 - reads as what happened
    """There is no such object, bucket or folder."""


class AccessDenied(StorageError):  # noqa: N818
    """Credentials are missing, rejected, or don't allow it."""


class ObjectChanged(StorageError):  # noqa: N818
    """The object is no longer the version that was asked for."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as listed.

    Attributes:
        uri: `s3://bucket/key`, `gs://bucket/name`, or an absolute local path.
        size: Bytes.
        version: Changes whenever the content does: `<etag>-<size>` on S3, `<generation>-<size>` on
            Google Cloud Storage, `<modification time in ns>-<size>` for a local file.
    """

    uri: str
    size: int
    version: str


class _Service(Protocol):
    """What a storage service must offer; URIs are normalised by `Storage`."""

    def list(self, uri: str) -> Iterator[ObjectInfo]: ...

    def stat(self, uri: str) -> ObjectInfo: ...

    def open(self, info: ObjectInfo) -> _RangeReader: ...

    def write(self, uri: str, data: bytes) -> ObjectInfo: ...


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
        return io.BufferedReader(self.open_raw(uri, version), buffer_size=_CHUNK_BYTES)

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

    def write(self, uri: str, data: bytes) -> ObjectInfo:
        """Writes a whole object in one atomic step: readers see the old one or the new one.

        Raises:
            StorageError: the object is not written (or, after a lost answer, whole all the same).
        """
        uri = normalised(uri)
        if len(data) > _MAX_PUT_BYTES:
            raise StorageError(uri, f"{len(data)} bytes are more than one PUT can hold (5 GiB)")
        return self._service(uri).write(uri, data)

    def _service(self, uri: str) -> _Service:
        scheme = uri.partition("://")[0] if "://" in uri else ""
        if scheme == "s3":
            environment = tuple(sorted(x for x in os.environ.items() if x[0].startswith("AWS_")))
            with _clients_lock, _errors_of(uri):
                return _s3(self.endpoint_url, self.region, environment, os.getpid())
        if scheme == "gs":
            with _clients_lock, _errors_of(uri):
                return _gcs(os.environ.get("STORAGE_EMULATOR_HOST"), os.getpid())
        if scheme == "":
            return _Local()
        raise StorageError(uri, f"{scheme}:// is not supported (s3://, gs:// and local paths are)")


def normalised(uri: str) -> str:
    """One spelling for each place: no trailing slash, and local paths absolute, without file://."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        path = unquote(rest) if separator else uri
        if not path or (separator and not path.startswith("/")):
            raise StorageError(uri, "is not an absolute path" if separator else "is not a path")
        return "/" + os.path.abspath(path).lstrip("/")  # noqa: PTH100 - Path keeps '..'
    if not rest.strip("/"):
        raise StorageError(uri, "names no bucket")
    return uri.rstrip("/")


def _pinned(uri: str, version: str) -> ObjectInfo:
    return ObjectInfo(uri, int(version.rpartition("-")[2]), version)


def _split(uri: str) -> tuple[str, str]:
    """`s3://bucket/some/key` -> `bucket`, `some/key`."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def _no_bucket(bucket: str) -> str:
    return f"bucket {bucket!r} does not exist"


class _RangeReader(io.RawIOBase):
    """A seekable stream over `fetch(start, stop)`, which returns those bytes of one version."""

    def __init__(
        self,
        info: ObjectInfo,
        fetch: Callable[[int, int], bytes],
        close: Callable[[], None] | None = None,
    ) -> None:
        self._info = info
        self._fetch = fetch
        self._close = close
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._info.size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fills the buffer up to the end of the object, never less (pyarrow relies on it)."""
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._info.size - self._position))
        for done in range(0, wanted, _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, wanted - done)
            start = self._position + done
            data = self._fetch(start, start + count)
            if len(data) != count:
                raise StorageError(
                    self._info.uri, f"{len(data)} bytes at offset {start} where {count} should be"
                )
            view[done : done + count] = data
        self._position += wanted
        return wanted

    def readall(self) -> bytes:
        data = bytearray(max(0, self._info.size - self._position))
        self.readinto(data)
        return bytes(data)

    def close(self) -> None:
        if not self.closed and self._close is not None:
            self._close()
        super().close()


def _retried(uri: str, transient: tuple[type[Exception], ...], action: Callable[[], T]) -> T:
    """Runs `action` again, with growing pauses, while it fails in a way that may pass."""
    for attempt in range(1, _READ_ATTEMPTS + 1):
        try:
            return action()
        except transient as error:
            if attempt == _READ_ATTEMPTS:
                cause = f"failed {attempt} times, last with {_described(error)}"
                raise StorageError(uri, cause) from error
            # Jitter keeps readers that failed together from returning together.
            time.sleep(_BACKOFF_SECONDS * 2**attempt * random.uniform(0.5, 1))
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _errors_of(uri: str) -> Iterator[None]:
    """Names the URI in a failure to make a client, which serves all URIs."""
    try:
        yield
    except StorageError as error:
        raise type(error)(uri, error.cause) from error


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# S3 --------------------------------------------------------------------------------------------

# boto3 itself retries a request for some seconds, until the answer's headers are there. A body that
# breaks off, and an outage of up to a minute, are retried here, for single objects only: a listing
# comes first in any job and should tell soon that an endpoint is wrong.
_S3_TRANSIENT = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
)
_S3_REJECTED = {
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_S3_DENIED = {"403", "AccessDenied", "AccountProblem", "AllAccessDisabled", "Forbidden"}

_clients_lock = threading.Lock()  # making boto3 clients is not thread-safe, using them is


@functools.lru_cache(maxsize=8)
def _s3(
    endpoint_url: str | None, region: str | None, environment: tuple[tuple[str, str], ...], pid: int
) -> _S3:
    """One client per process, made anew when the AWS variables of the environment change."""
    del pid
    variables = dict(environment)
    endpoint = endpoint_url or variables.get("AWS_ENDPOINT_URL_S3")
    endpoint = endpoint or variables.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {
        "connect_timeout": 10,
        "read_timeout": 60,
        "max_pool_connections": 32,
        "tcp_keepalive": True,
        "retries": {"mode": "standard"},
    }
    if "AWS_MAX_ATTEMPTS" not in variables:
        options["retries"]["total_max_attempts"] = 5
    if endpoint:  # other services: not all know virtual hosts, nor AWS's newer checksums
        options["s3"] = {"addressing_style": "path"}
        options["request_checksum_calculation"] = "when_required"
        options["response_checksum_validation"] = "when_required"
    try:
        client = boto3.session.Session().client(
            "s3", endpoint_url=endpoint or None, region_name=region, config=Config(**options)
        )
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise StorageError("s3://", f"the S3 client can't be made: {error}") from error
    return _S3(client)


class _S3:
    def __init__(self, client: Any) -> None:
        self._client = client

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        bucket, key = _split(uri)
        if key:
            # The object itself sorts first among those that share its name as a prefix.
            first = self._call(uri, "list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
            for entry in first.get("Contents", []):
                if entry["Key"] == key:
                    yield _s3_info(bucket, entry)
                    return
        request = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
        while True:
            page = self._call(uri, "list_objects_v2", **request)
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):
                    yield _s3_info(bucket, entry)
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def stat(self, uri: str) -> ObjectInfo:
        bucket, key = _split(uri)
        try:
            head = self._call(uri, "head_object", Bucket=bucket, Key=key)
        except ObjectNotFound:
            # A HEAD has no body that would tell a missing bucket from a missing object.
            self._call(uri, "list_objects_v2", Bucket=bucket, MaxKeys=1)
            raise
        size = head["ContentLength"]
        return ObjectInfo(uri, size, _s3_version(head["ETag"], size))

    def open(self, info: ObjectInfo) -> _RangeReader:
        bucket, key = _split(info.uri)
        etag = '"' + info.version.rpartition("-")[0] + '"'

        def fetch(start: int, stop: int) -> bytes:
            def attempt() -> bytes:
                response = self._call(
                    info.uri,
                    "get_object",
                    Bucket=bucket,
                    Key=key,
                    Range=f"bytes={start}-{stop - 1}",
                    IfMatch=etag,
                )
                with response["Body"] as body:
                    data: bytes = body.read()
                if len(data) < stop - start:
                    raise http.client.IncompleteRead(data, stop - start - len(data))
                return data

            return _retried(info.uri, _S3_TRANSIENT, attempt)

        return _RangeReader(info, fetch)

    def write(self, uri: str, data: bytes) -> ObjectInfo:
        bucket, key = _split(uri)
        put = functools.partial(self._call, uri, "put_object", Bucket=bucket, Key=key, Body=data)
        response = _retried(uri, _S3_TRANSIENT, put)
        return ObjectInfo(uri, len(data), _s3_version(response["ETag"], len(data)))

    def _call(self, uri: str, operation: str, **request: Any) -> Any:
        """One request, retried by boto3; what fails for good becomes a `StorageError`."""
        try:
            return getattr(self._client, operation)(**request)
        except botocore.exceptions.ClientError as error:
            raise _s3_error(uri, error) from error
        except (
            botocore.exceptions.NoCredentialsError,
            botocore.exceptions.PartialCredentialsError,
            botocore.exceptions.CredentialRetrievalError,
            botocore.exceptions.TokenRetrievalError,
            botocore.exceptions.SSOError,
        ) as error:
            cause = (
                f"no usable AWS credentials were found ({error}): set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, a profile, or an instance role"
            )
            raise AccessDenied(uri, cause) from error
        except _S3_TRANSIENT as error:
            if operation in {"get_object", "put_object"}:
                raise  # the caller tries again
            endpoint = self._client.meta.endpoint_url
            cause = f"the endpoint {endpoint} can't be reached: {_described(error)}"
            raise StorageError(uri, cause) from error
        except botocore.exceptions.BotoCoreError as error:  # such as an invalid bucket name
            raise StorageError(uri, " ".join(str(error).split())) from error


def _s3_info(bucket: str, entry: dict[str, Any]) -> ObjectInfo:
    version = _s3_version(entry["ETag"], entry["Size"])
    return ObjectInfo(f"s3://{bucket}/{entry['Key']}", entry["Size"], version)


def _s3_version(etag: str, size: int) -> str:
    etag = etag.strip('"')
    return f"{etag}-{size}"


def _s3_error(uri: str, error: botocore.exceptions.ClientError) -> StorageError:
    details = error.response.get("Error", {})
    code = str(details.get("Code", ""))
    message = str(details.get("Message", "")) or code
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if code == "NoSuchBucket":
        return ObjectNotFound(uri, _no_bucket(_split(uri)[0]))
    if code in {"404", "NoSuchKey", "NotFound"}:
        return ObjectNotFound(uri, "no such object")
    if code in {"412", "PreconditionFailed"}:
        return ObjectChanged(uri, _CHANGED)
    if code in _S3_REJECTED:
        return AccessDenied(uri, f"credentials were rejected: {message} ({code})")
    if code in _S3_DENIED:
        return AccessDenied(uri, f"access denied: {message} ({code})")
    if status in {301, 307, 400} and code in {"301", "307", "400", "PermanentRedirect"}:
        return StorageError(uri, f"the bucket is in another region: {message} ({code})")
    return StorageError(uri, f"{message} ({code})")


# Google Cloud Storage ----------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _gcs(emulator: str | None, pid: int) -> _Gcs:
    """One client per process; the client itself honours STORAGE_EMULATOR_HOST."""
    del emulator, pid
    try:
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import storage
    except ImportError as error:
        cause = "gs:// needs the Google Cloud Storage client: pip install 'cvt-label[gcs]'"
        raise StorageError("gs://", cause) from error
    try:
        return _Gcs(storage.Client())
    except (GoogleAuthError, OSError) as error:  # OSError: no project can be told
        raise AccessDenied("gs://", f"no usable Google Cloud credentials: {error}") from error


class _Gcs:
    def __init__(self, client: Any) -> None:
        self._client = client

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        bucket, name = _split(uri)
        if name:
            blob = self._call(uri, self._client.bucket(bucket).get_blob, name)
            if blob is not None:
                yield _gcs_info(blob)
                return
        for blob in self._below(uri, bucket, f"{name}/" if name else ""):
            if not blob.name.endswith("/"):
                yield _gcs_info(blob)

    def stat(self, uri: str) -> ObjectInfo:
        bucket, name = _split(uri)
        blob = self._call(uri, self._client.bucket(bucket).get_blob, name)
        if blob is None:
            next(self._below(uri, bucket, name), None)  # tells a missing bucket from a missing object
            raise ObjectNotFound(uri, "no such object")
        return _gcs_info(blob)

    def open(self, info: ObjectInfo) -> _RangeReader:
        import google.api_core.exceptions as api
        import requests.exceptions

        transient = (
            requests.exceptions.RequestException,
            urllib3.exceptions.HTTPError,
            http.client.HTTPException,
            api.ServerError,
            api.TooManyRequests,
            OSError,
        )
        bucket, name = _split(info.uri)
        blob = self._client.bucket(bucket).blob(name)
        generation = int(info.version.rpartition("-")[0])

        def fetch(start: int, stop: int) -> bytes:
            def attempt() -> bytes:
                data: bytes = blob.download_as_bytes(
                    start=start,
                    end=stop - 1,
                    if_generation_match=generation,
                    raw_download=True,  # else what is stored as gzip comes unpacked, at other offsets
                    checksum=None,  # is over the whole object
                )
                if len(data) < stop - start:
                    raise http.client.IncompleteRead(data, stop - start - len(data))
                return data

            return self._call(info.uri, _retried, info.uri, transient, attempt)

        return _RangeReader(info, fetch)

    def write(self, uri: str, data: bytes) -> ObjectInfo:
        from google.cloud.storage.retry import DEFAULT_RETRY

        bucket, name = _split(uri)
        blob = self._client.bucket(bucket).blob(name)
        upload = functools.partial(
            blob.upload_from_string,
            content_type="application/octet-stream",
            retry=DEFAULT_RETRY,  # writing the same bytes again is harmless
        )
        self._call(uri, upload, data, missing=_no_bucket(bucket))
        return _gcs_info(blob)

    def _below(self, uri: str, bucket: str, prefix: str) -> Iterator[Any]:
        missing = _no_bucket(bucket)
        blobs = iter(self._client.list_blobs(bucket, prefix=prefix or None))
        while (blob := self._call(uri, next, blobs, None, missing=missing)) is not None:
            yield blob

    def _call(self, uri: str, action: Callable[..., T], *args: Any, missing: str = "no such object") -> T:
        """One request, retried by the client; what fails for good becomes a `StorageError`."""
        import google.api_core.exceptions as api
        import google.auth.exceptions

        try:
            return action(*args)
        except api.NotFound as error:
            raise ObjectNotFound(uri, missing) from error
        except api.PreconditionFailed as error:
            raise ObjectChanged(uri, _CHANGED) from error
        except (api.Forbidden, api.Unauthorized) as error:
            raise AccessDenied(uri, f"access denied: {error.message}") from error
        except google.auth.exceptions.GoogleAuthError as error:
            raise AccessDenied(uri, f"credentials were rejected: {error}") from error
        except (api.GoogleAPIError, OSError, ValueError) as error:
            raise StorageError(uri, _described(error)) from error


def _gcs_info(blob: Any) -> ObjectInfo:
    uri = f"gs://{blob.bucket.name}/{blob.name}"
    return ObjectInfo(uri, blob.size, f"{blob.generation}-{blob.size}")


# Local files -------------------------------------------------------------------------------------


class _Local:
    def list(self, uri: str) -> Iterator[ObjectInfo]:
        with _local_errors(uri):
            found = os.stat(uri)  # noqa: PTH116
        if stat.S_ISDIR(found.st_mode):
            yield from _walk(uri, frozenset({(found.st_dev, found.st_ino)}))
        else:
            yield _local_info(uri, found)

    def stat(self, uri: str) -> ObjectInfo:
        with _local_errors(uri):
            found = os.stat(uri)  # noqa: PTH116
        if not stat.S_ISREG(found.st_mode):
            raise ObjectNotFound(uri, "not a file")
        return _local_info(uri, found)

    def open(self, info: ObjectInfo) -> _RangeReader:
        with _local_errors(info.uri):
            descriptor = os.open(info.uri, os.O_RDONLY)

        def fetch(start: int, stop: int) -> bytes:
            with _local_errors(info.uri):
                parts = []
                while start < stop and (part := os.pread(descriptor, stop - start, start)):
                    parts.append(part)
                    start += len(part)
                # Looked at after the bytes: what was written meanwhile is noticed.
                if _local_info(info.uri, os.fstat(descriptor)).version != info.version:
                    raise ObjectChanged(info.uri, _CHANGED)
            return b"".join(parts)

        return _RangeReader(info, fetch, close=functools.partial(os.close, descriptor))

    def write(self, uri: str, data: bytes) -> ObjectInfo:
        folder = Path(uri).parent
        # No reader's `**/*.parquet` may ever match what a crash leaves behind.
        temporary = folder / f".{uuid.uuid4().hex}.tmp"
        with _local_errors(uri):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    found = os.fstat(file.fileno())
                temporary.replace(uri)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_folder(folder)
        return _local_info(uri, found)


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[ObjectInfo]:
    """Files below `folder`, bytewise by path; links are followed, except back to a folder above."""
    with _local_errors(folder), os.scandir(folder) as scan:
        entries = [(os.fsencode(e.name) + b"/" * e.is_dir(), e.path) for e in scan]
    for _, path in sorted(entries):
        try:
            path.encode()
        except UnicodeEncodeError:
            raise StorageError(ascii(path), "the file's name is not UTF-8") from None
        try:
            found = os.stat(path)  # noqa: PTH116
        except FileNotFoundError:  # a dead link, or just removed: let its reading say so
            yield ObjectInfo(path, 0, "0-0")
            continue
        except OSError as error:
            raise _local_error(path, error) from error
        identity = (found.st_dev, found.st_ino)
        if stat.S_ISREG(found.st_mode):
            yield _local_info(path, found)
        elif stat.S_ISDIR(found.st_mode) and identity not in above:
            yield from _walk(path, above | {identity})


def _sync_folder(folder: Path) -> None:
    """Makes a renaming last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _local_info(path: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(path, found.st_size, f"{found.st_mtime_ns}-{found.st_size}")


@contextlib.contextmanager
def _local_errors(path: str) -> Iterator[None]:
    """Turns an OSError of the block into a `StorageError` of the path."""
    try:
        yield
    except OSError as error:
        raise _local_error(path, error) from error


def _local_error(path: str, error: OSError) -> StorageError:
    if isinstance(error, FileNotFoundError):
        return ObjectNotFound(path, "no such file or folder")
    if isinstance(error, PermissionError):
        return AccessDenied(path, "access denied")
    return StorageError(path, error.strerror or str(error))
