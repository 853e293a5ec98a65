"""Google Cloud Storage, with the optional package google-cloud-storage."""

from typing import Any, BinaryIO

import google.api_core.exceptions as api
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud import storage

from pipeline.storage.buckets import (
    MISSING_FIELD,
    Buckets,
    Page,
    access_denied,
    malformed_response,
    split_uri,
)
from pipeline.storage.limits import KEPT_CONNECTIONS, RequestLimits, limited_pools
from pipeline.storage.objects import ABSENT, ObjectChanged, ObjectInfo, ObjectNotFound, StorageError
from pipeline.storage.retrying import CONNECTION_ERRORS, Failure, describe_error

_TRANSIENT = (api.ServerError, api.TooManyRequests, *CONNECTION_ERRORS)


def connect(limits: RequestLimits, anonymous: bool, requester_pays: bool) -> "GoogleCloudStorage":  # noqa: D103
    try:
        client = storage.Client.create_anonymous_client() if anonymous else storage.Client()
    except (GoogleAuthError, OSError) as error:  # OSError: the project is unknown
        cause = f"no usable Google Cloud credentials: {error}; for a public bucket, set storage.anonymous"
        raise StorageError("gs://", cause) from error
    for adapter in client._http.adapters.values():
        pools = adapter.poolmanager.pool_classes_by_scheme
        adapter.poolmanager.pool_classes_by_scheme = limited_pools(pools, limits)
        adapter.poolmanager.connection_pool_kw["maxsize"] = KEPT_CONNECTIONS
    return GoogleCloudStorage(client, anonymous, requester_pays)


class GoogleCloudStorage(Buckets):
    """Google Cloud Storage, accessed with Google's client."""

    def object_store_options(self) -> dict[str, str]:  # noqa: D102
        return {"google_skip_signature": "true"} if self._anonymous else {}

    def _page(self, start: str, delimiter: str, token: str | None, limit: int | None) -> Page:
        bucket, prefix = split_uri(start)
        blobs = self._client.list_blobs(
            self._bucket(bucket),
            prefix=prefix or None,
            delimiter=delimiter or None,
            page_token=token,
            page_size=limit,
            fields="items(name,size,generation),prefixes,nextPageToken",
            retry=None,
        )
        infos = [_info(blob) for blob in next(blobs.pages, [])]
        folders = [f"gs://{bucket}/{folder}" for folder in sorted(blobs.prefixes)]
        return Page(infos, folders, blobs.next_page_token)

    def _head(self, uri: str) -> ObjectInfo:
        blob = self._blob(uri)
        blob.reload(retry=None)
        return _info(blob)

    def _get(self, info: ObjectInfo, start: int, stop: int) -> bytes:
        data: bytes = self._blob(info.uri).download_as_bytes(
            start=start or None,
            end=stop - 1 if stop else None,
            if_generation_match=_generation(info.version),
            raw_download=True,  # decompressed objects would have other offsets
            checksum=None,  # the checksum covers the whole object
            retry=None,
        )
        return data

    def _put(self, uri: str, data: BinaryIO, expected: str | None) -> ObjectInfo:
        blob = self._blob(uri)
        blob.upload_from_file(data, rewind=True, if_generation_match=_generation(expected), retry=None)
        return _info(blob)

    def _delete(self, uri: str, expected: str | None) -> None:
        self._blob(uri).delete(if_generation_match=_generation(expected), retry=None)

    def _blob(self, uri: str) -> Any:
        bucket, name = split_uri(uri)
        return self._bucket(bucket).blob(name)

    def _bucket(self, name: str) -> Any:
        return self._client.bucket(name, user_project=self._client.project if self._requester_pays else None)

    def _explain(self, uri: str, error: Exception, attempts: int) -> Failure:
        cause, kind = describe_error(error), type(error).__name__
        if isinstance(error, api.NotFound):
            return Failure(ObjectNotFound(uri, "no such object"))
        if isinstance(error, api.PreconditionFailed):
            return Failure(ObjectChanged(uri))
        # A bucket whose requester pays answers 400.
        if isinstance(error, (api.Forbidden, api.Unauthorized)) or "requester pays" in cause:
            return access_denied(uri, getattr(error, "message", cause), kind)
        if isinstance(error, GoogleAuthError):
            cause = f"no usable Google Cloud credentials: {error}"
            attempts = attempts if error.retryable or isinstance(error, TransportError) else 1
        elif isinstance(error, (api.GoogleAPIError, ValueError)):
            attempts = attempts if isinstance(error, _TRANSIENT) else 1
        elif isinstance(error, MISSING_FIELD):
            return malformed_response(uri, error, attempts)
        elif not isinstance(error, _TRANSIENT):
            raise error
        return Failure(StorageError(uri, cause), attempts, kind)


def _generation(version: str | None) -> int | None:
    if version == ABSENT:
        return 0  # matches only a missing object
    return version if version is None else int(version.rpartition("-")[0])


def _info(blob: Any) -> ObjectInfo:
    uri = f"gs://{blob.bucket.name}/{blob.name}"
    return ObjectInfo(uri, int(blob.size), f"{int(blob.generation)}-{blob.size}")
