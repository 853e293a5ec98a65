"""Google Cloud Storage, with the optional package google-cloud-storage."""

# ruff: noqa: D102 - `Storage` documents the methods

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

import google.api_core.exceptions as api
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud import storage

from pipeline.storage.limits import RequestLimits, limited_pools
from pipeline.storage.objects import (
    ABSENT,
    VERSION_CHANGED,
    VERSION_MISMATCH,
    ObjectChanged,
    ObjectInfo,
    ObjectNotFound,
    StorageError,
    bucket_not_found,
    check_listing,
    object_not_found,
    split_uri,
)
from pipeline.storage.ranges import RangeReader
from pipeline.storage.retrying import CONNECTION_ERRORS, TransientFailure, check_length, describe_error, retry

T = TypeVar("T")


@functools.lru_cache(maxsize=8)
def make_client(limits: RequestLimits, emulator: str | None, pid: int) -> Any:
    """Returns a client, one per process and emulator; the client itself reads STORAGE_EMULATOR_HOST."""
    del emulator, pid
    try:
        client = storage.Client()
    except (GoogleAuthError, OSError) as error:  # OSError: the project is unknown
        raise StorageError("gs://", f"no usable Google Cloud credentials: {error}") from error
    for adapter in client._http.adapters.values():
        pools = adapter.poolmanager.pool_classes_by_scheme
        adapter.poolmanager.pool_classes_by_scheme = limited_pools(pools, limits)
    return client


class GoogleCloudStorage:
    """Google Cloud Storage, accessed with Google's client."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        found = self._find(uri) if split_uri(uri)[1] else None
        for info in self._listing(uri) if found is None else [_info(found)]:
            if not info.uri.endswith("/"):
                yield info

    def list_folders(self, uri: str) -> Iterator[str]:
        for entry in self._listing(uri, delimiter="/"):
            if isinstance(entry, str):
                yield entry.rstrip("/")

    def stat(self, uri: str) -> ObjectInfo:
        found = self._find(uri)
        if found is None:
            next(self._listing(uri), None)  # raises if the bucket is missing
            raise object_not_found(uri)
        return _info(found)

    def open(self, info: ObjectInfo) -> RangeReader:
        blob, generation = self._blob(info.uri), _generation(info.version)

        def fetch(start: int, stop: int) -> bytes:
            def attempt() -> bytes:
                data = blob.download_as_bytes(
                    start=start,
                    end=stop - 1,
                    if_generation_match=generation,
                    raw_download=True,  # decompressed objects would have other offsets
                    checksum=None,  # the checksum covers the whole object
                    retry=None,
                )
                return check_length(data, stop - start)

            return self._request(info.uri, attempt)

        return RangeReader(info, fetch)

    def write(self, uri: str, data: BinaryIO, expected: str | None) -> ObjectInfo:
        blob = self._blob(uri)

        def attempt() -> None:
            blob.upload_from_file(
                data,
                rewind=True,
                content_type="application/octet-stream",
                if_generation_match=_generation(expected),
                retry=None,
            )

        self._request(uri, attempt, missing=bucket_not_found, changed=VERSION_MISMATCH)
        return _info(blob)

    def delete(self, uri: str, expected: str | None) -> None:
        generation = _generation(expected)
        attempt = functools.partial(self._blob(uri).delete, if_generation_match=generation, retry=None)
        with contextlib.suppress(ObjectNotFound):
            self._request(uri, attempt, changed=VERSION_MISMATCH)

    def _listing(self, uri: str, **options: str) -> Iterator[Any]:
        bucket, name = split_uri(uri)
        options |= {"fields": "items(name,size,generation),prefixes,nextPageToken"}
        prefix = f"{name}/" if name else None

        def request(token: str | None) -> tuple[Sequence[Any], str | None]:
            blobs = self._client.list_blobs(bucket, prefix=prefix, page_token=token, retry=None, **options)
            infos = [_info(blob) for blob in next(blobs.pages, [])]
            folders = [f"gs://{bucket}/{folder}" for folder in sorted(blobs.prefixes)]
            return infos + folders, blobs.next_page_token

        def fetch(token: str | None) -> tuple[Sequence[Any], str | None]:
            return self._request(uri, functools.partial(request, token), missing=bucket_not_found)

        return check_listing(uri, fetch)

    def _blob(self, uri: str) -> Any:
        bucket, name = split_uri(uri)
        return self._client.bucket(bucket).blob(name)

    def _find(self, uri: str) -> Any:
        """Returns an object's properties; None if the object does not exist."""
        bucket, name = split_uri(uri)
        get = functools.partial(self._client.bucket(bucket).get_blob, name, retry=None)
        return self._request(uri, get)

    def _request(
        self,
        uri: str,
        action: Callable[[], T],
        missing: Callable[[str], StorageError] = object_not_found,
        changed: str = VERSION_CHANGED,
    ) -> T:
        """Makes one request, with retries; raises a permanent failure as `StorageError`."""
        try:
            return retry(action, _transient)
        except api.NotFound as error:
            raise missing(uri) from error
        except api.PreconditionFailed as error:
            raise ObjectChanged(uri, changed) from error
        except (api.Forbidden, api.Unauthorized) as error:
            raise StorageError(uri, f"access denied: {error.message}") from error
        except TransportError as error:
            raise StorageError(uri, f"cannot fetch credentials: {error}") from error
        except GoogleAuthError as error:
            raise StorageError(uri, f"the credentials were rejected: {error}") from error
        except (api.GoogleAPIError, OSError, ValueError) as error:
            raise StorageError(uri, describe_error(error)) from error


def _transient(error: Exception) -> TransientFailure | None:
    if isinstance(error, api.Forbidden):  # as on S3, may be transient
        return TransientFailure(type(error).__name__, attempts=4)
    is_transient = isinstance(
        error, (api.ServerError, api.TooManyRequests, TransportError, *CONNECTION_ERRORS)
    )
    is_transient = is_transient or (isinstance(error, GoogleAuthError) and error.retryable)
    return TransientFailure(type(error).__name__) if is_transient else None


def _generation(version: str | None) -> int | None:
    if version is None:
        return None
    return (
        0 if version == ABSENT else int(version.rpartition("-")[0])
    )  # generation 0 matches only a missing object


def _info(blob: Any) -> ObjectInfo:
    uri = f"gs://{blob.bucket.name}/{blob.name}"
    return ObjectInfo(uri, blob.size, f"{blob.generation}-{blob.size}")
