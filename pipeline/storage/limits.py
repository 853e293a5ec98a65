"""Limits on each HTTP request: total time, minimum throughput, and size of the response.

Client libraries only limit the time between two bytes. These connections count all bytes at the socket.
"""

import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Maximum bytes of a response besides the requested range. A page of a listing has at most 3.5 MB.
MAX_RESPONSE_BYTES = 4 * 1024**2
_SEND_BYTES = 64 * 1024
_MAX_READS_AT_END = 100


class RequestLimitError(OSError):
    """A request took too long, or its response is too large. The message has the figures."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits on the time of a request: `timeout_s`, plus 1 s per `min_bytes_per_s` bytes transferred."""

    timeout_s: float
    min_bytes_per_s: float


class _LimitedSocket:
    """A connected socket or TLS socket that limits the time and the size of each request."""

    # As in urllib3's own wrappers of sockets: `makefile` returns a file that calls `recv_into`.
    makefile = socket.socket.makefile
    close = socket.socket.close
    _decref_socketios = socket.socket._decref_socketios  # type: ignore[attr-defined]

    def __init__(self, sock: Any, limits: RequestLimits) -> None:
        self._socket, self._limits = sock, limits
        self._io_refs, self._closed = 0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def _real_close(self) -> None:
        self._socket.close()

    def start(self, requested_range: object) -> None:
        """Starts to count a request with this `Range` header."""
        bounds = re.search(r"(\d+)-(\d+)", str(requested_range))
        self._max_received = MAX_RESPONSE_BYTES + (int(bounds[2]) - int(bounds[1]) if bounds else 0)
        self._started = time.monotonic()
        self._sent = self._received = self._reads_at_end = 0

    def recv_into(self, *args: Any) -> int:
        count = self._transfer(self._socket.recv_into, *args)
        self._received += count
        if self._received > self._max_received:
            raise RequestLimitError(f"the response has more than {self._max_received:,} bytes")
        self._reads_at_end += not count
        if self._reads_at_end > _MAX_READS_AT_END:  # botocore reads on if a header is cut off
            raise ConnectionResetError("the connection ended within a header")
        return count

    def sendall(self, data: Any) -> None:
        remaining = memoryview(data).cast("B")
        while remaining:
            count = self._transfer(self._socket.send, remaining[:_SEND_BYTES])
            self._sent += count
            remaining = remaining[count:]

    def _transfer(self, action: Callable[..., int], *args: Any) -> int:
        """Sends or receives within the remaining time; returns the number of bytes."""
        allowed = self._limits.timeout_s + (self._sent + self._received) / self._limits.min_bytes_per_s
        elapsed = time.monotonic() - self._started
        try:
            if elapsed >= allowed:
                raise TimeoutError
            self._socket.settimeout(min(self._limits.timeout_s, allowed - elapsed))
            return action(*args)
        except TimeoutError:
            counts = f"sent {self._sent:,} and received {self._received:,} bytes"
            cause = f"the request is too slow: {counts} in {time.monotonic() - self._started:.3g} s"
            raise RequestLimitError(f"{cause} (storage.request_timeout_s)") from None


#: Connections that a client keeps open. Beyond these, it closes a connection after each request, and warns.
KEPT_CONNECTIONS = 256


def limited_pools(pools: dict[str, Any], limits: RequestLimits) -> dict[str, Any]:
    """Returns subclasses of urllib3's classes of connection pools, by scheme, whose requests are limited."""
    return {scheme: _limited(pool, limits) for scheme, pool in pools.items()}


def _limited(pool: Any, limits: RequestLimits) -> Any:
    class Connection(pool.ConnectionCls):  # type: ignore[misc]
        sock: Any

        def connect(self) -> None:
            super().connect()
            self.sock = _LimitedSocket(self.sock, limits)

        def request(self, method: str, url: str, body: Any, headers: Any, **options: Any) -> None:
            if self.sock is None:
                self.connect()
            self.sock.start(headers.get("Range"))
            super().request(method, url, body, headers, **options)

    return type(pool.__name__, (pool,), {"ConnectionCls": Connection})


def exceeded_limit(error: BaseException | None) -> RequestLimitError | None:
    """Returns the exceeded limit that caused a client library's exception, if any."""
    while error is not None and not isinstance(error, RequestLimitError):
        error = error.__cause__ or error.__context__
    return error
