"""What the services of buckets have in common: retries of requests, and listings that end."""

# ruff: noqa: D102 - `Storage` documents the methods

import contextlib
import functools
import http.client
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeVar

from pipeline.storage.objects import (
    ABSENT,
    AccessDenied,
    BucketNotFound,
    ObjectChanged,
    ObjectInfo,
    ObjectNotFound,
    StorageError,
)
from pipeline.storage.ranges import RangeReader
from pipeline.storage.retrying import Failure, describe_error, retry

T = TypeVar("T")

#: Exceptions at the first use of a field that a response lacks, which client libraries accept.
MISSING_FIELD = (AttributeError, KeyError, TypeError)
_MAX_EMPTY_PAGES = 100
#: Maximum number of attempts; and when access is denied, which a busy service sometimes does.
ATTEMPTS, DENIED_ATTEMPTS = 10, 4
_LISTING_ATTEMPTS = 5  # a listing is the first request of a job, which soon reports a wrong endpoint


class Page(NamedTuple):
    """A page of a listing: objects, URIs of folders with a slash at the end, and the next page's token."""

    objects: Sequence[ObjectInfo]
    folders: Sequence[str]
    token: str | None


class Buckets(ABC):
    """A service of buckets. Subclasses make single requests, and explain failures."""

    def __init__(self, client: Any, anonymous: bool = False, requester_pays: bool = False) -> None:
        self._client, self._anonymous, self._requester_pays = client, anonymous, requester_pays

    def list(self, uri: str, prefix: str) -> Iterator[ObjectInfo]:
        if split_uri(uri)[1] and not prefix:
            # Among the objects whose URI starts with `uri`, the object `uri` itself comes first.
            first = next(self._pages(uri, limit=1)).objects
            if first and first[0].uri == uri:
                yield first[0]
                return
        for page in self._pages(f"{uri}/{prefix}"):
            yield from (info for info in page.objects if not info.uri.endswith("/"))

    def list_folders(self, uri: str) -> Iterator[str]:
        for page in self._pages(f"{uri}/", "/"):
            yield from (folder.rstrip("/") for folder in page.folders)

    def stat(self, uri: str) -> ObjectInfo:
        try:
            return self._request(uri, lambda: self._head(uri))
        except ObjectNotFound:
            next(self._pages(f"{uri}/", limit=1))  # raises if the bucket is missing
            raise

    def open(self, info: ObjectInfo) -> RangeReader:
        def fetch(start: int, stop: int) -> bytes:
            def attempt() -> bytes:
                data = self._get(info, start, stop)
                if len(data) != stop - start:
                    raise http.client.IncompleteRead(data, stop - start - len(data))
                return data

            return self._request(info.uri, attempt)

        if not info.size:
            fetch(0, 0)  # the only check that the object is empty
        return RangeReader(info, fetch)

    def write(self, uri: str, data: BinaryIO, expected: str | None) -> ObjectInfo:
        data.seek(0)  # a file that is closed or not seekable fails before the retried request
        try:
            return self._request(uri, lambda: self._put(uri, data, expected))
        except ObjectNotFound:
            if expected in (None, ABSENT):
                raise bucket_not_found(uri) from None
            raise ObjectChanged(uri) from None

    def delete(self, uri: str, expected: str | None) -> None:
        with contextlib.suppress(ObjectNotFound):
            try:
                self._request(uri, lambda: self._delete(uri, expected))
            except ObjectChanged:
                self.stat(uri)  # S3 reports a missing object as changed
                raise

    def _pages(self, start: str, delimiter: str = "", limit: int | None = None) -> Iterator[Page]:
        """Yields pages of the URIs that begin with `start`; raises `StorageError` if the pages never end."""
        uri = start.rstrip("/")
        token = None
        tokens = {""}
        empty_pages = 0
        while True:
            try:
                request = functools.partial(self._page, start, delimiter, token, limit)
                page = self._request(uri, request, _LISTING_ATTEMPTS)
            except ObjectNotFound:
                raise bucket_not_found(uri) from None
            token = page.token
            names = [*page.folders, *(info.uri for info in page.objects)]
            empty_pages = 0 if names else empty_pages + 1
            problem = ""
            if outside := [name for name in names if not name.startswith(start)]:
                problem = f"{outside[0]!r} is outside of the folder"
            elif token in tokens:
                problem = "a page is not the last, but has no new token"
            elif empty_pages > _MAX_EMPTY_PAGES:
                problem = f"{empty_pages} pages in a row are empty"
            if problem:
                cause = f"the store's listing of bucket {split_uri(uri)[0]!r} is invalid: {problem}"
                raise StorageError(uri, cause)
            yield page
            if token is None:
                return
            tokens.add(token)

    def _request(self, uri: str, action: Callable[[], T], attempts: int = ATTEMPTS) -> T:
        """Makes one request, with up to `attempts` attempts to reach the service."""
        return retry(action, lambda error: self._explain(uri, error, attempts))

    @abstractmethod
    def object_store_options(self) -> dict[str, str]: ...

    @abstractmethod
    def _explain(self, uri: str, error: Exception, attempts: int) -> Failure: ...

    @abstractmethod
    def _page(self, start: str, delimiter: str, token: str | None, limit: int | None) -> Page: ...

    @abstractmethod
    def _head(self, uri: str) -> ObjectInfo: ...

    @abstractmethod
    def _get(self, info: ObjectInfo, start: int, stop: int) -> bytes: ...

    @abstractmethod
    def _put(self, uri: str, data: BinaryIO, expected: str | None) -> ObjectInfo: ...

    @abstractmethod
    def _delete(self, uri: str, expected: str | None) -> None: ...


def split_uri(uri: str) -> tuple[str, str]:
    """Returns bucket and key: `bucket` and `some/key` for `s3://bucket/some/key`."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def access_denied(uri: str, cause: str, kind: str) -> Failure:  # noqa: D103
    cause = f"access denied: {cause}; see storage.anonymous and storage.requester_pays"
    return Failure(AccessDenied(uri, cause), DENIED_ATTEMPTS, kind)


def malformed_response(uri: str, error: Exception, attempts: int) -> Failure:  # noqa: D103
    cause = f"failed after retries, last with a malformed response: {describe_error(error)}"
    return Failure(StorageError(uri, cause), attempts, "MalformedResponse")


def bucket_not_found(uri: str) -> StorageError:  # noqa: D103
    return BucketNotFound(uri, f"bucket {split_uri(uri)[0]!r} does not exist")
