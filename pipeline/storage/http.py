"""Downloads of http(s) objects, many at a time, in an event loop of a background thread."""

import asyncio
import gzip
import http.client
import io
import re
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urljoin

import aiohttp
from yarl import URL

from pipeline.storage.limits import RequestLimits
from pipeline.storage.objects import AccessDenied, ObjectNotFound, ObjectTooLarge, StorageError
from pipeline.storage.retrying import Failure, pause_before_retry
from pipeline.text import remove_secrets

T = TypeVar("T")

_HEADERS = {"User-Agent": "cvt-label (batch image labeling; aiohttp)", "Accept-Encoding": "identity"}
_REDIRECTS, _MAX_REDIRECTS = {301, 302, 303, 307, 308}, 10
_ABSENT, _DENIED, _NO_HEAD = {404, 410}, {401, 403, 407, 451}, {405, 501}
#: Maximum number of attempts: fewer than for buckets, because many hosts in old tables no longer exist.
_ATTEMPTS, _BUSY_ATTEMPTS = 5, 10
_MAX_RETRY_AFTER_S = 30.0
#: Causes and numbers of attempts of exceptions, whose own messages may contain the query of the address.
_CAUSES: dict[type[Exception], tuple[str, int]] = {
    TimeoutError: ("timeout: no complete response in time (storage.request_timeout_s)", 4),
    aiohttp.ClientConnectorCertificateError: ("the TLS certificate is not valid (see SSL_CERT_FILE)", 1),
    aiohttp.ClientSSLError: ("cannot establish a TLS connection", 2),
    aiohttp.ClientConnectorDNSError: ("cannot resolve the name of the host", 3),
    aiohttp.ClientProxyConnectionError: ("cannot connect to the proxy", _ATTEMPTS),
    aiohttp.ClientConnectorError: ("cannot connect to the host", _ATTEMPTS),
    aiohttp.ClientConnectionError: ("the connection ended before the response", _ATTEMPTS),
    ValueError: ("the URI, its redirect or the proxy is not a valid http(s) address", 1),
    Exception: ("the response is malformed or incomplete", _ATTEMPTS),
}


class Download(NamedTuple):
    """Decompressed content, and the version `<etag>-<size before decompression>`; None without an ETag."""

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
        self._limits, self._slots = limits, asyncio.Semaphore(concurrent_downloads)
        self._host_slots = defaultdict[object, asyncio.Semaphore](
            lambda: asyncio.Semaphore(downloads_per_host)
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="downloads", daemon=True)
        self._thread.start()
        self._session = self._start(self._open_session()).result()

    def download(self, uri: str, max_bytes: int) -> Future[Download]:
        """Starts to download an object; follows up to 10 redirects within http(s)."""
        return self._start(self._fetch("GET", uri, max_bytes))

    def version(self, uri: str) -> Future[str | None]:
        """Starts a HEAD request for the version; None also without a size, or if the server has no HEAD.

        A server may deny HEAD of a URI that is signed for GET.
        """

        async def fetch() -> str | None:
            return (await self._fetch("HEAD", uri, 0)).version

        return self._start(fetch())

    def close(self) -> None:
        """Cancels the unfinished requests, closes the connections, and ends the thread."""
        if not self._loop.is_closed():
            self._start(self._close_session()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _open_session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            # The semaphores limit the connections. Idle ones end soon, because a table may have many hosts.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=5, ttl_dns_cache=300),
            timeout=aiohttp.ClientTimeout(sock_connect=min(10, self._limits.timeout_s)),
            auto_decompress=False,  # has no limit on the size
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=_HEADERS,
        )

    async def _close_session(self) -> None:
        requests = asyncio.all_tasks() - {asyncio.current_task()}
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        await self._session.close()
        await self._loop.shutdown_default_executor()

    async def _fetch(self, method: str, uri: str, max_bytes: int) -> Download:
        """Makes a request; follows redirects, and retries transient failures."""
        attempt = 1
        while True:
            try:
                address = uri
                for _ in range(_MAX_REDIRECTS + 1):
                    response = await self._request(method, address, max_bytes)
                    if isinstance(response, Download):
                        return response
                    address = response
                raise StorageError(uri, f"more than {_MAX_REDIRECTS} redirects")
            except StorageError as error:
                raise type(error)(_shown(uri), error.cause) from None
            except Exception as error:
                pause = pause_before_retry(error, _explain(_shown(uri), error), attempt)
            await asyncio.sleep(pause)
            attempt += 1

    async def _request(self, method: str, address: str, max_bytes: int) -> Download | str:
        """Makes one request; returns the response, or the address of a redirect."""
        # An ASCII address is sent as it is, because a signature may cover its spelling.
        url = URL(address, encoded=not re.search(r"[^!-~]", address))
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("not an http(s) address")
        proxies = {} if urllib.request.proxy_bypass(url.host) else urllib.request.getproxies()
        options: Any = {"proxy": proxies.get(url.scheme), "allow_redirects": False}
        too_large = ObjectTooLarge(address, f"the object has more than {max_bytes:,} bytes")
        async with self._host_slots[url.host, url.port], self._slots:
            end, parts, received = self._loop.time() + self._limits.timeout_s, list[bytes](), 0
            async with (
                asyncio.timeout_at(end) as timer,
                self._session.request(method, url, **options) as response,
            ):
                headers, status, size = response.headers, response.status, response.content_length
                if status in _REDIRECTS and "Location" in headers:
                    return urljoin(address, headers["Location"])
                if method == "HEAD" and status in _NO_HEAD:
                    return Download(b"", None)
                if not 200 <= status < 300:
                    raise aiohttp.ClientResponseError(
                        response.request_info, (), status=status, headers=headers
                    )
                tag = headers.get("ETag", "").removeprefix("W/").strip('"')
                if method == "HEAD":
                    return Download(b"", f"{tag}-{size}" if tag and size is not None else None)
                if (size or 0) > max_bytes:
                    raise too_large
                async for part in response.content.iter_any():
                    received += len(part)
                    if received > max_bytes:
                        raise too_large
                    parts.append(part)
                    timer.reschedule(end + received / self._limits.min_bytes_per_s)
        content, encoding = b"".join(parts), headers.get("Content-Encoding", "identity").lower()
        if encoding not in ("", "identity", "gzip", "x-gzip"):
            raise StorageError(address, f"the Content-Encoding {encoding[:20]!r} is not supported")
        if "gzip" in encoding and content.startswith(b"\x1f\x8b"):  # some headers are wrong
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(max_bytes + 1)
        if len(content) > max_bytes:
            raise too_large
        return Download(content, f"{tag}-{received}" if tag else None)


def _explain(shown: str, error: Exception) -> Failure:
    # Malformed responses also have a status, and a cause.
    if isinstance(error, aiohttp.ClientResponseError) and error.__cause__ is None:
        status, kind = error.status, f"HTTP {error.status}"
        attempts = _BUSY_ATTEMPTS if status == 429 else _ATTEMPTS if status == 408 or status >= 500 else 1
        wait = error.headers.get("Retry-After", "") if error.headers else ""
        failure = ObjectNotFound if status in _ABSENT else AccessDenied if status in _DENIED else StorageError
        cause = f"{kind} {http.client.responses.get(status, '')}".rstrip()
        pause = min(_MAX_RETRY_AFTER_S, float(wait)) if wait.isdecimal() else 0.0
        return Failure(failure(shown, cause), attempts, kind, pause)
    cause, attempts = next(known for kinds, known in _CAUSES.items() if isinstance(error, kinds))
    source = getattr(error, "certificate_error", None) or getattr(error, "os_error", None)
    if detail := getattr(source, "strerror", None):
        cause = f"{cause}: {detail}"
    return Failure(StorageError(shown, cause), attempts, type(error).__name__)


def _shown(uri: str) -> str:
    address, query, _ = uri.partition("?")
    return remove_secrets(address.partition("#")[0]) + query + "..." * bool(query)
