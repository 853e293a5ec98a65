"""Google Cloud Storage. Needs google-cloud-storage, which not every installation has."""

# ruff: noqa: D102 - `Storage` describes the verbs

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import google.api_core.exceptions as api
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud import storage

from pipeline.storage.buckets import CONNECTION_ERRORS, described, no_bucket, no_object, split, whole
from pipeline.storage.objects import (
    ABSENT,
    NOT_AS_EXPECTED,
    NOT_AS_LISTED,
    AccessDenied,
    ObjectChanged,
    ObjectInfo,
    ObjectNotFound,
    StorageError,
)
from pipeline.storage.ranges import RangeReader
from pipeline.storage.retrying import Fault, retried

T = TypeVar("T")


@functools.lru_cache(maxsize=8)
def connected(emulator: str | None, pid: int) -> GoogleCloudStorage:
    """One client per process; the client itself honours STORAGE_EMULATOR_HOST."""
    del emulator, pid
    try:
        return GoogleCloudStorage(storage.Client())
    except (GoogleAuthError, OSError) as error:  # OSError: no project can be told
        raise AccessDenied("gs://", f"no usable Google Cloud credentials: {error}") from error


class GoogleCloudStorage:
    """The service, through Google's own client."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        bucket, name = split(uri)
        if name:
            blob = self._blob(uri)
            if blob is not None:
                yield _info(blob)
                return
        for blob in self._below(uri, bucket, f"{name}/" if name else ""):
            if not blob.name.endswith("/"):
                yield _info(blob)

    def folders(self, uri: str) -> Iterator[str]:
        bucket, name = split(uri)
        token: str | None = None

        def page() -> tuple[set[str], str | None]:
            prefix = f"{name}/" if name else None
            blobs = self._client.list_blobs(
                bucket, prefix=prefix, delimiter="/", page_token=token, retry=None
            )
            next(blobs.pages, None)
            return set(blobs.prefixes), blobs.next_page_token

        while True:
            prefixes, token = _tried(uri, page, missing=no_bucket)
            yield from (f"gs://{bucket}/{prefix.rstrip('/')}" for prefix in sorted(prefixes))
            if not token:
                return

    def stat(self, uri: str) -> ObjectInfo:
        bucket, name = split(uri)
        blob = self._blob(uri)
        if blob is None:
            next(self._below(uri, bucket, name), None)  # tells a missing bucket from a missing object
            raise no_object(uri)
        return _info(blob)

    def open(self, info: ObjectInfo) -> RangeReader:
        bucket, name = split(info.uri)
        blob = self._client.bucket(bucket).blob(name)
        generation = _generation(info.version)

        def fetch(start: int, stop: int) -> bytes:
            def attempt() -> bytes:
                data = blob.download_as_bytes(
                    start=start,
                    end=stop - 1,
                    if_generation_match=generation,
                    raw_download=True,  # else what is stored as gzip comes unpacked, at other offsets
                    checksum=None,  # is over the whole object
                    retry=None,
                )
                return whole(data, stop - start)

            return _tried(info.uri, attempt)

        return RangeReader(info, fetch)

    def write(self, uri: str, data: BinaryIO, expected: str | None) -> ObjectInfo:
        bucket, name = split(uri)
        generation = None
        if expected is not None:  # no object has generation 0
            generation = 0 if expected == ABSENT else _generation(expected)
        blob = self._client.bucket(bucket).blob(name)

        def attempt() -> None:
            blob.upload_from_file(
                data,
                rewind=True,
                content_type="application/octet-stream",
                if_generation_match=generation,
                retry=None,
            )

        _tried(uri, attempt, missing=no_bucket, changed=NOT_AS_EXPECTED)
        return _info(blob)

    def delete(self, uri: str, expected: str | None) -> None:
        bucket, name = split(uri)
        blob = self._client.bucket(bucket).blob(name)
        generation = None if expected is None else _generation(expected)
        attempt = functools.partial(blob.delete, if_generation_match=generation, retry=None)
        with contextlib.suppress(ObjectNotFound):
            _tried(uri, attempt, changed=NOT_AS_EXPECTED)

    def _below(self, uri: str, bucket: str, prefix: str) -> Iterator[Any]:
        token: str | None = None

        def page() -> tuple[list[Any], str | None]:
            blobs = self._client.list_blobs(bucket, prefix=prefix or None, page_token=token, retry=None)
            return list(next(blobs.pages, ())), blobs.next_page_token

        while True:
            blobs, token = _tried(uri, page, missing=no_bucket)
            yield from blobs
            if not token:
                return

    def _blob(self, uri: str) -> Any:
        """An object's properties; None if there is none."""
        bucket, name = split(uri)
        get = functools.partial(self._client.bucket(bucket).get_blob, name, retry=None)
        return _tried(uri, get)


def _tried(
    uri: str,
    action: Callable[[], T],
    missing: Callable[[str], ObjectNotFound] = no_object,
    changed: str = NOT_AS_LISTED,
) -> T:
    """One request, tried again if need be; what fails for good becomes a `StorageError`."""
    try:
        return retried(action, _fault)
    except api.NotFound as error:
        raise missing(uri) from error
    except api.PreconditionFailed as error:
        raise ObjectChanged(uri, changed) from error
    except (api.Forbidden, api.Unauthorized) as error:
        raise AccessDenied(uri, f"access denied: {error.message}") from error
    except TransportError as error:
        raise StorageError(uri, f"no credentials could be fetched: {error}") from error
    except GoogleAuthError as error:
        raise AccessDenied(uri, f"credentials were rejected: {error}") from error
    except (api.GoogleAPIError, OSError, ValueError) as error:
        raise StorageError(uri, described(error)) from error


def _fault(error: Exception) -> Fault | None:
    """Whether a failure may pass."""
    if isinstance(error, api.Forbidden):  # as on S3
        return Fault(type(error).__name__, attempts=4)
    passing = isinstance(error, (api.ServerError, api.TooManyRequests, TransportError, *CONNECTION_ERRORS))
    passing = passing or (isinstance(error, GoogleAuthError) and error.retryable)
    return Fault(type(error).__name__) if passing else None


def _generation(version: str) -> int:
    return int(version.rpartition("-")[0])


def _info(blob: Any) -> ObjectInfo:
    uri = f"gs://{blob.bucket.name}/{blob.name}"
    return ObjectInfo(uri, blob.size, f"{blob.generation}-{blob.size}")
