"""Object storage: s3://, gs:// and local files behind five verbs (list, open, stat, write, delete).

The only module that talks to a storage service. Not a file system: objects are written whole, in one
atomic step, and read at a pinned version. What fails in a way that may pass is tried again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import http.client
import io
import os
import re
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import unquote

import boto3
import botocore.exceptions
import urllib3.exceptions
from botocore.config import Config

from pipeline.retrying import Fault, retried

_CHUNK_BYTES = 8 * 1024**2  # one ranged GET; what an open object holds in memory
_AHEAD_BUFFER_BYTES = 1024**2
_CHANGED = "the object is no longer the version that was listed"
_NOT_EXPECTED = "the object is not the version that was expected"
_MAX_PUT_BYTES = 5 * 1024**3  # of one PUT, on S3 and on Google Cloud Storage

#: In the place of a version: there is to be no such object.
ABSENT = "absent"

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


class BucketNotFound(ObjectNotFound):
    """There is no such bucket."""


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

    def open_ahead(self, uri: str, version: str, at_once: int) -> io.BufferedReader:
        """As `open`, for reading from start to end: as many ranges as `at_once` are fetched at a time.

        A local file is read ahead by the operating system.
        """
        uri = normalised(uri)
        service = self._service(uri)
        raw = service.open(_pinned(uri, version))
        if isinstance(service, _Local):
            return io.BufferedReader(raw, buffer_size=_CHUNK_BYTES)
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
            view[done : done + count] = self._fetched(start, start + count)
        self._position += wanted
        return wanted

    def _fetched(self, start: int, stop: int) -> bytes:
        data = self._fetch(start, stop)
        if len(data) != stop - start:
            cause = f"{len(data)} bytes at offset {start} where {stop - start} should be"
            raise StorageError(self._info.uri, cause)
        return data

    def readall(self) -> bytes:
        data = bytearray(max(0, self._info.size - self._position))
        self.readinto(data)
        return bytes(data)

    def ahead(self, at_once: int) -> _ReadAhead:
        """The same, fetching ahead."""
        return _ReadAhead(self._info, self._fetch, at_once)

    def close(self) -> None:
        if not self.closed and self._close is not None:
            self._close()
        super().close()


class _ReadAhead(_RangeReader):
    """Fetches what comes next while its reader works on what came before.

    Blocks of 8 MiB, as many at once as `at_once`, which it holds beside the one that is read. For reading
    forwards: a jump to where nothing was fetched starts anew there.
    """

    def __init__(self, info: ObjectInfo, fetch: Callable[[int, int], bytes], at_once: int) -> None:
        super().__init__(info, fetch)
        self._at_once = at_once
        self._blocks: dict[int, Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="read-ahead")

    def readinto(self, buffer: Any, /) -> int:
        """Fills the buffer up to the end of the object."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and self._position < self._info.size:
            number, offset = divmod(self._position, _CHUNK_BYTES)
            data = memoryview(self._block(number))[offset : offset + len(view) - done]
            view[done : done + len(data)] = data
            done += len(data)
            self._position += len(data)
        return done

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _block(self, number: int) -> bytes:
        """A block's bytes; sees to it that the next ones are on their way."""
        last = (self._info.size - 1) // _CHUNK_BYTES
        wanted = range(number, min(number + self._at_once, last) + 1)
        for other in self._blocks.keys() - set(wanted):
            self._blocks.pop(other).cancel()
        for other in wanted:
            if other not in self._blocks:
                start = other * _CHUNK_BYTES
                stop = min(start + _CHUNK_BYTES, self._info.size)
                self._blocks[other] = self._pool.submit(self._fetched, start, stop)
        return self._blocks[number].result()


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

# boto3 is kept from trying again by itself: it doesn't know of bodies that break off, and isn't counted.
_S3_CONNECTION = (
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
_S3_BUSY = {"ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown", "Throttling"}
_S3_BUSY |= {"ThrottlingException", "TooManyRequests", "RequestLimitExceeded", "BandwidthLimitExceeded"}
# botocore takes an answer that breaks off in its head, or right after it, for one that lacks the rest.
_S3_WHOLE: dict[str, Callable[[dict[str, Any]], bool]] = {
    "head_object": lambda answer: "ETag" in answer and "ContentLength" in answer,
    "list_objects_v2": lambda answer: len(answer) > 1,  # has more than the ResponseMetadata
    "put_object": lambda answer: "ETag" in answer,
}

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
        "retries": {"total_max_attempts": 1},
    }
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
        etag = _s3_etag(info.version)

        def fetch(start: int, stop: int) -> bytes:
            place = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{stop - 1}", "IfMatch": etag}

            def attempt() -> bytes:
                with self._client.get_object(**place)["Body"] as body:
                    data: bytes = body.read()
                if len(data) < stop - start:
                    raise http.client.IncompleteRead(data, stop - start - len(data))
                return data

            return self._tried(info.uri, attempt)

        return _RangeReader(info, fetch)

    def write(self, uri: str, data: BinaryIO, expected: str | None) -> ObjectInfo:
        bucket, key = _split(uri)
        condition = {}
        if expected == ABSENT:
            condition = {"IfNoneMatch": "*"}
        elif expected is not None:
            condition = {"IfMatch": _s3_etag(expected)}

        def attempt() -> Any:
            data.seek(0)
            return self._request("put_object", Bucket=bucket, Key=key, Body=data, **condition)

        try:
            response = self._tried(uri, attempt)
        except ObjectChanged:
            raise ObjectChanged(uri, _NOT_EXPECTED) from None
        except ObjectNotFound as error:
            if expected in (None, ABSENT) or isinstance(error, BucketNotFound):
                raise
            raise ObjectChanged(uri, _NOT_EXPECTED) from None
        size = data.seek(0, os.SEEK_END)
        return ObjectInfo(uri, size, _s3_version(response["ETag"], size))

    def delete(self, uri: str, expected: str | None) -> None:
        bucket, key = _split(uri)
        condition = {} if expected is None else {"IfMatch": _s3_etag(expected)}
        try:
            self._call(uri, "delete_object", Bucket=bucket, Key=key, **condition)
        except ObjectChanged:
            with contextlib.suppress(ObjectNotFound):  # then there is nothing that could have changed
                self.stat(uri)
                raise ObjectChanged(uri, _NOT_EXPECTED) from None
        except ObjectNotFound as error:
            if isinstance(error, BucketNotFound):
                raise

    def _call(self, uri: str, operation: str, **request: Any) -> Any:
        return self._tried(uri, lambda: self._request(operation, **request), soon="list" in operation)

    def _request(self, operation: str, **request: Any) -> Any:
        answer = getattr(self._client, operation)(**request)
        if operation in _S3_WHOLE and not _S3_WHOLE[operation](answer):
            raise http.client.IncompleteRead(b"")
        return answer

    def _tried(self, uri: str, action: Callable[[], T], soon: bool = False) -> T:
        """One request, tried again if need be; what fails for good becomes a `StorageError`.

        A listing comes first in any job, and should tell soon that an endpoint is wrong.
        """
        try:
            return retried(action, functools.partial(_s3_fault, soon=soon))
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
        except botocore.exceptions.ConnectionError as error:
            endpoint = self._client.meta.endpoint_url.rpartition("@")[2]  # without credentials
            cause = f"the endpoint {endpoint} can't be reached: {_described(error)}"
            raise StorageError(uri, cause) from error
        except _S3_CONNECTION as error:
            raise StorageError(uri, f"failed again and again, last with {_described(error)}") from error
        except botocore.exceptions.BotoCoreError as error:  # such as an invalid bucket name
            raise StorageError(uri, " ".join(str(error).split())) from error


def _s3_fault(error: Exception, soon: bool) -> Fault | None:
    """Whether a failure may pass."""
    if isinstance(error, botocore.exceptions.ClientError):
        code, status = _s3_code(error)
        if code in _S3_BUSY or status == 429 or (status or 0) >= 500:
            return Fault(code)
        # Busy stores deny access now and then; where it is really denied, that should be told soon.
        return Fault(code, attempts=4) if code in _S3_DENIED else None
    if isinstance(error, _S3_CONNECTION):
        return Fault(type(error).__name__, attempts=5 if soon else 10)
    return None


def _s3_code(error: botocore.exceptions.ClientError) -> tuple[str, int | None]:
    code = str(error.response.get("Error", {}).get("Code", ""))
    return code, error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _s3_info(bucket: str, entry: dict[str, Any]) -> ObjectInfo:
    version = _s3_version(entry["ETag"], entry["Size"])
    return ObjectInfo(f"s3://{bucket}/{entry['Key']}", entry["Size"], version)


def _s3_version(etag: str, size: int) -> str:
    etag = etag.strip('"')
    return f"{etag}-{size}"


def _s3_etag(version: str) -> str:
    return '"' + version.rpartition("-")[0] + '"'


def _s3_error(uri: str, error: botocore.exceptions.ClientError) -> StorageError:
    code, status = _s3_code(error)
    message = str(error.response.get("Error", {}).get("Message", "")) or code
    if code == "NoSuchBucket":
        return BucketNotFound(uri, _no_bucket(_split(uri)[0]))
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
            blob = self._blob(uri)
            if blob is not None:
                yield _gcs_info(blob)
                return
        for blob in self._below(uri, bucket, f"{name}/" if name else ""):
            if not blob.name.endswith("/"):
                yield _gcs_info(blob)

    def stat(self, uri: str) -> ObjectInfo:
        bucket, name = _split(uri)
        blob = self._blob(uri)
        if blob is None:
            next(self._below(uri, bucket, name), None)  # tells a missing bucket from a missing object
            raise ObjectNotFound(uri, "no such object")
        return _gcs_info(blob)

    def open(self, info: ObjectInfo) -> _RangeReader:
        bucket, name = _split(info.uri)
        blob = self._client.bucket(bucket).blob(name)
        generation = _gcs_generation(info.version)

        def fetch(start: int, stop: int) -> bytes:
            def attempt() -> bytes:
                data: bytes = blob.download_as_bytes(
                    start=start,
                    end=stop - 1,
                    if_generation_match=generation,
                    raw_download=True,  # else what is stored as gzip comes unpacked, at other offsets
                    checksum=None,  # is over the whole object
                    retry=None,
                )
                if len(data) < stop - start:
                    raise http.client.IncompleteRead(data, stop - start - len(data))
                return data

            return self._call(info.uri, retried, attempt, _gcs_fault)

        return _RangeReader(info, fetch)

    def write(self, uri: str, data: BinaryIO, expected: str | None) -> ObjectInfo:
        bucket, name = _split(uri)
        generation = None
        if expected is not None:  # no object has generation 0
            generation = 0 if expected == ABSENT else _gcs_generation(expected)
        blob = self._client.bucket(bucket).blob(name)

        def attempt() -> None:
            blob.upload_from_file(
                data,
                rewind=True,
                content_type="application/octet-stream",
                if_generation_match=generation,
                retry=None,
            )

        try:
            self._call(uri, retried, attempt, _gcs_fault, missing=_no_bucket(bucket))
        except ObjectChanged:
            raise ObjectChanged(uri, _NOT_EXPECTED) from None
        return _gcs_info(blob)

    def delete(self, uri: str, expected: str | None) -> None:
        bucket, name = _split(uri)
        blob = self._client.bucket(bucket).blob(name)
        generation = None if expected is None else _gcs_generation(expected)
        attempt = functools.partial(blob.delete, if_generation_match=generation, retry=None)
        with contextlib.suppress(ObjectNotFound):
            self._call(uri, retried, attempt, _gcs_fault)

    def _below(self, uri: str, bucket: str, prefix: str) -> Iterator[Any]:
        token: str | None = None

        def page() -> tuple[list[Any], str | None]:
            blobs = self._client.list_blobs(bucket, prefix=prefix or None, page_token=token, retry=None)
            return list(next(blobs.pages, ())), blobs.next_page_token

        while True:
            blobs, token = self._call(uri, retried, page, _gcs_fault, missing=_no_bucket(bucket))
            yield from blobs
            if not token:
                return

    def _blob(self, uri: str) -> Any:
        """An object's properties; None if there is none."""
        bucket, name = _split(uri)
        get = functools.partial(self._client.bucket(bucket).get_blob, name, retry=None)
        return self._call(uri, retried, get, _gcs_fault)

    def _call(self, uri: str, action: Callable[..., T], *args: Any, missing: str = "no such object") -> T:
        """One request; what fails for good becomes a `StorageError`."""
        import google.api_core.exceptions as api
        import google.auth.exceptions

        try:
            return action(*args)
        except api.NotFound as error:
            kind = BucketNotFound if missing == _no_bucket(_split(uri)[0]) else ObjectNotFound
            raise kind(uri, missing) from error
        except api.PreconditionFailed as error:
            raise ObjectChanged(uri, _CHANGED) from error
        except (api.Forbidden, api.Unauthorized) as error:
            raise AccessDenied(uri, f"access denied: {error.message}") from error
        except google.auth.exceptions.GoogleAuthError as error:
            raise AccessDenied(uri, f"credentials were rejected: {error}") from error
        except (api.GoogleAPIError, OSError, ValueError) as error:
            raise StorageError(uri, _described(error)) from error


def _gcs_fault(error: Exception) -> Fault | None:
    """Whether a failure may pass."""
    import google.api_core.exceptions as api
    import requests.exceptions

    connection = (
        requests.exceptions.RequestException,
        urllib3.exceptions.HTTPError,
        http.client.HTTPException,
        OSError,
    )
    if isinstance(error, api.Forbidden):  # as on S3
        return Fault(type(error).__name__, attempts=4)
    passing = isinstance(error, (api.ServerError, api.TooManyRequests, *connection))
    return Fault(type(error).__name__) if passing else None


def _gcs_generation(version: str) -> int:
    return int(version.rpartition("-")[0])


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

    def write(self, uri: str, data: BinaryIO, expected: str | None) -> ObjectInfo:
        folder = Path(uri).parent
        # No reader's `**/*.parquet` may ever match what a crash leaves behind.
        temporary = folder / f".{uuid.uuid4().hex}.tmp"
        with _local_errors(uri):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("xb") as file:
                    data.seek(0)
                    shutil.copyfileobj(data, file)
                    file.flush()
                    os.fsync(file.fileno())
                with _locked(folder):  # no other writer's between the look and the renaming
                    self._check(uri, expected, temporary)
                    found = temporary.stat()
                    temporary.replace(uri)
                    _sync_folder(folder)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        return _local_info(uri, found)

    def delete(self, uri: str, expected: str | None) -> None:
        with _local_errors(uri), contextlib.suppress(FileNotFoundError), _locked(Path(uri).parent):
            if expected not in (None, _local_info(uri, os.stat(uri)).version):  # noqa: PTH116
                raise ObjectChanged(uri, _NOT_EXPECTED)
            Path(uri).unlink()
            _sync_folder(Path(uri).parent)

    def _check(self, uri: str, expected: str | None, temporary: Path) -> None:
        """Raises ObjectChanged if the file is not as expected; else makes its successor younger."""
        try:
            former = os.stat(uri)  # noqa: PTH116
        except FileNotFoundError:
            former = None
        version = _local_info(uri, former).version if former else ABSENT
        if expected not in (None, version):
            raise ObjectChanged(uri, _NOT_EXPECTED)
        # Clocks of file systems tick every few milliseconds: two writes may fall together.
        if former and temporary.stat().st_mtime_ns <= former.st_mtime_ns:
            os.utime(temporary, ns=(former.st_atime_ns, former.st_mtime_ns + 1))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps others that lock the folder out of the block."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


#: What a write has in the making, or a crash has left of one.
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.tmp$")


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[ObjectInfo]:
    """Files below `folder`, bytewise by path; links are followed, except back to a folder above."""
    with _local_errors(folder), os.scandir(folder) as scan:
        entries = [
            (os.fsencode(e.name) + b"/" * e.is_dir(), e.path) for e in scan if not _UNFINISHED.match(e.name)
        ]
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
