"""Downloads of http(s) objects, many at a time, in an event loop of a background thread."""

import asyncio
import http.client
import re
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import aiohttp
from yarl import URL

from pipeline.storage.limits import RequestLimits
from pipeline.storage.objects import AccessDenied, ObjectNotFound, ObjectTooLarge, StorageError
from pipeline.storage.retrying import Failure, pause_before_retry
from pipeline.text import remove_secrets

_HEADERS = {"User-Agent": "cvt-label (batch image labeling; aiohttp)", "Accept-Encoding": "identity"}
_STATUSES: dict[int, type[StorageError]]
_STATUSES = {**dict.fromkeys((404, 410), ObjectNotFound), **dict.fromkeys((401, 403, 407, 451), AccessDenied)}
#: Maximum number of attempts: fewer than for buckets, because many hosts in old tables no longer exist.
_ATTEMPTS, _BUSY_ATTEMPTS = 4, 10
#: Failed connections to a host, in all requests since the last response. After the maximum, requests to the
#: host are not repeated: retries for each of many images would take hours.
_unreachable, _MAX_FAILURES = Counter[str](), 50
_PERMANENT = (ValueError, aiohttp.NonHttpUrlClientError, aiohttp.TooManyRedirects)
#: Causes of exceptions, whose own messages may contain the query of the address.
_CAUSES: dict[type[Exception] | tuple[type[Exception], ...], str] = {
    TimeoutError: "timeout: no complete response in time (storage.request_timeout_s)",
    aiohttp.ClientConnectorCertificateError: "the TLS certificate is not valid (see SSL_CERT_FILE)",
    aiohttp.ClientConnectorError: "cannot connect to the host or proxy",
    aiohttp.TooManyRedirects: "too many redirects: more than 9",
    _PERMANENT: "the URI or its redirect is not a valid http(s) address",
    Exception: "the response is malformed or incomplete",
}


class Download(NamedTuple):
    """The content, and the version `<etag>-<size>`; None without an ETag."""

    content: bytes
    version: str | None


class Downloader(AbstractContextManager["Downloader"]):
    """Downloads http(s) objects concurrently: `with storage.downloader() as downloader: ...`.

    Use an instance in the process that created it. Proxies come from the environment. The methods return at
    once; a queue of their futures keeps the order. The futures raise, after retries of transient failures,
    `ObjectNotFound` (status 404, 410), `AccessDenied` (status 401, 403, 407, 451), `ObjectTooLarge`, or
    another `StorageError`. Messages have neither a password nor the query of the URI, which may be signed.
    """

    def __init__(self, limits: RequestLimits, concurrent_downloads: int, downloads_per_host: int) -> None:
        self._limits, is_open = limits, threading.Event()
        serve = self._serve(is_open, concurrent_downloads, downloads_per_host)
        self._thread = threading.Thread(target=asyncio.run, args=[serve], name="downloads", daemon=True)
        self._thread.start()
        is_open.wait()

    def download(self, uri: str, max_bytes: int) -> Future[Download]:
        """Starts to download an object; follows redirects within http(s)."""
        return self._start(self._fetch("GET", uri, max_bytes))

    def head(self, uri: str) -> Future[Download]:
        """Starts a HEAD request for the version, which is None also without a size."""
        return self._start(self._fetch("HEAD", uri, sys.maxsize))

    def close(self) -> None:
        """Cancels the unfinished requests, closes the connections, and ends the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, work: Coroutine[Any, Any, Download]) -> Future[Download]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _serve(self, is_open: threading.Event, limit: int, limit_per_host: int) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        timeout_s = self._limits.timeout_s
        async with aiohttp.ClientSession(
            # Idle connections end soon, because a table may have many hosts.
            connector=aiohttp.TCPConnector(
                limit=limit, limit_per_host=limit_per_host, keepalive_timeout=5, ttl_dns_cache=300
            ),
            # The wait for a free connection does not count.
            timeout=aiohttp.ClientTimeout(sock_connect=min(10, timeout_s), sock_read=timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # has no limit on the size
            requote_redirect_url=False,  # a signature may cover the spelling
            headers=_HEADERS,
        ) as self._session:
            is_open.set()
            await self._end.wait()

    async def _fetch(self, method: str, uri: str, max_bytes: int) -> Download:
        """Makes a request, and retries transient failures."""
        address, query, _ = uri.partition("?")
        shown = remove_secrets(address.partition("#")[0]) + ("?..." if query else "")
        attempt, host = 1, uri.partition("://")[2].partition("/")[0]
        while True:
            try:
                found = await self._request(method, uri, shown, max_bytes)
                del _unreachable[host]
                return found
            except StorageError:
                raise
            except Exception as error:
                failure = _explain(shown, error)
                _unreachable[host] += isinstance(error, aiohttp.ClientConnectorError)
                if _unreachable[host] > _MAX_FAILURES:
                    failure = replace(failure, attempts=1)
                pause = pause_before_retry(error, failure, attempt)
            await asyncio.sleep(pause)
            attempt += 1

    async def _request(self, method: str, uri: str, shown: str, max_bytes: int) -> Download:
        # An ASCII address is sent as it is, because a signature may cover its spelling.
        url = URL(uri, encoded=not re.search(r"[^!-~]", uri))
        proxies = {} if urllib.request.proxy_bypass(url.host or "") else urllib.request.getproxies()
        async with self._session.request(method, url, proxy=proxies.get(url.scheme)) as response:
            response.raise_for_status()
            headers, size = response.headers, response.content_length
            if (encoding := headers.get("Content-Encoding", "")) not in ("", "identity"):
                raise StorageError(shown, f"the Content-Encoding {encoding[:20]!r} is not supported")
            too_large = ObjectTooLarge(shown, f"the object has more than {max_bytes:,} bytes")
            if (size or 0) > max_bytes:
                raise too_large
            content, started = bytearray(), self._loop.time()
            async for part in response.content.iter_any():
                content += part
                if len(content) > max_bytes:
                    raise too_large
                allowed_s = self._limits.timeout_s + len(content) / self._limits.min_bytes_per_s
                if self._loop.time() - started > allowed_s:
                    raise TimeoutError
        size = len(content) if method == "GET" else size
        tag = headers.get("ETag", "").removeprefix("W/").strip('"')
        return Download(bytes(content), f"{tag}-{size}" if tag and size is not None else None)


def _explain(shown: str, error: Exception) -> Failure:
    # Malformed responses also have a status, and a cause.
    if type(error) is aiohttp.ClientResponseError and error.__cause__ is None:
        status, kind = error.status, f"HTTP {error.status}"
        attempts = _BUSY_ATTEMPTS if status == 429 else _ATTEMPTS if status == 408 or status >= 500 else 1
        cause = f"{kind} {http.client.responses.get(status, '')}".rstrip()
        return Failure(_STATUSES.get(status, StorageError)(shown, cause), attempts, kind)
    cause = next(cause for kind, cause in _CAUSES.items() if isinstance(error, kind))
    if detail := getattr(getattr(error, "os_error", None), "strerror", None):
        cause = f"{cause}: {detail}"
    attempts = 1 if isinstance(error, _PERMANENT) else _ATTEMPTS
    return Failure(StorageError(shown, cause), attempts, type(error).__name__)
