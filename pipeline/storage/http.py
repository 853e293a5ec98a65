"""Downloads of http(s) objects, many at a time, in an event loop of a background thread."""

from __future__ import annotations

from concurrent.futures import Future
from typing import NamedTuple, Self

from pipeline.storage.limits import RequestLimits


class Download(NamedTuple):
    """A downloaded object.

    Attributes:
        content: The bytes, decompressed if the server compressed them for the transfer.
        version: `<etag>-<size>`, with the size before decompression; None if the server sends no ETag.
    """

    content: bytes
    version: str | None


class Downloader:
    """Downloads http(s) objects concurrently: `with storage.downloader() as downloader: ...`.

    The methods return at once. The futures complete in any order: keep them in a queue to get the results in
    order. A future of a failed request raises a `StorageError`, after retries of transient failures:

    - `ObjectNotFound`: status 404 or 410
    - `AccessDenied`: status 401, 403, 407 or 451
    - `ObjectTooLarge`: more than `max_bytes` bytes, before or after decompression
    - `RequestTimeout`: slower than `storage.request_timeout_s` and `storage.min_bytes_per_s` allow
    - `StorageError` itself: any other failure

    Their messages contain neither the query of the URI, which may be signed, nor a password. The event loop
    and its thread start with the first request in a process, and `close` ends them.
    """

    def __init__(self, limits: RequestLimits, concurrent_downloads: int, downloads_per_host: int) -> None:
        raise NotImplementedError

    def download(self, uri: str, max_bytes: int) -> Future[Download]:
        """Starts to download an object; follows up to 10 redirects within http(s)."""
        raise NotImplementedError

    def version(self, uri: str) -> Future[str | None]:
        """Starts a HEAD request for an object's version, as `Download.version`.

        The version is None if the server sends no ETag or no size, or does not support HEAD. A server may
        deny HEAD of a URI that is signed for GET.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Cancels the unfinished requests, closes the connections, and ends the thread."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
