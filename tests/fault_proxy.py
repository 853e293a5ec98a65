"""A loopback HTTP proxy in front of the S3 server that makes requests fail, by script or by chance."""

from __future__ import annotations

import contextlib
import random
import socket
import socketserver
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit
from xml.sax.saxutils import escape

_ANSWERS = {
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "denied": (403, "AccessDenied", "Access Denied"),
}

#: error, slow_down, denied: an answer of S3's, the request is not passed on.
#: reset: the connection is reset, the request is not passed on.
#: lost_answer: the request is carried out, then the connection is reset before any answer.
#: truncated: half of the answer's body, then the end of the connection.
#: no_body: the answer's head alone, then the end. Answers that have no body anyway are lost, in both cases.
#: no_head: the first line alone, then the end; it is all that a client needs to know of a DELETE.
#: delay: all is well, but later.
ALL_KINDS = (*_ANSWERS, "reset", "lost_answer", "truncated", "no_body", "no_head", "delay")

_PIECE = 256 * 1024
_TIMEOUT = 120.0
_OF_ONE_CONNECTION = {"connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"}


@dataclass(frozen=True)
class Request:
    """What a fault is chosen by."""

    method: str
    path: str  # with the query, as sent
    range: str | None


class FaultProxy:
    """Passes HTTP on to `upstream_url`, but for faults: `with FaultProxy(s3.endpoint_url) as proxy: ...`.

    By chance, every request is hit with probability `rate`. Which are hit depends on the seed, the
    request and how often it came, not on how threads interleave. The same request is never hit more than
    `most` times in a row.

    Attributes:
        url: for clients, in the place of the server's. They sign for it; the Host is passed on as sent.
        injected: how many faults of each kind there were.
        seen: the last requests, faulty or not.
        missing: those of them that the server answered by 404, in any order.
        upstream_failures: how often the server itself broke off; the client's connection is then reset.
    """

    def __init__(
        self,
        upstream_url: str,
        seed: int = 0,
        rate: float = 0.0,
        kinds: tuple[str, ...] = ALL_KINDS,
        most: int = 3,
        delay_seconds: float = 0.3,
    ) -> None:
        parts = urlsplit(upstream_url)
        assert parts.scheme == "http", upstream_url
        self.upstream = (parts.hostname or "", parts.port or 80)
        self.delay_seconds = delay_seconds
        self.injected: Counter[str] = Counter()
        self.seen: deque[Request] = deque(maxlen=100_000)
        self.missing: set[Request] = set()
        self.upstream_failures = 0
        self.closing = threading.Event()
        self._seed = seed
        self._rate = rate
        self._kinds = _known(kinds)
        self._most = most
        self._lock = threading.Lock()
        self._script: list[tuple[str, Callable[[Request], bool]]] = []
        self._times: Counter[Request] = Counter()
        self._in_a_row: Counter[Request] = Counter()
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.end_connections()

    def next(self, *kinds: str, where: Callable[[Request], bool] = lambda _: True) -> None:
        """Injects exactly these, in this order, on the next requests that match; they come before chance."""
        with self._lock:
            self._script += [(kind, where) for kind in _known(kinds)]

    def clear(self) -> None:
        """Forgets the script and what has been."""
        with self._lock:
            self._script.clear()
            self._times.clear()
            self._in_a_row.clear()
            self.injected.clear()
            self.seen.clear()
            self.missing.clear()
            self.upstream_failures = 0

    @property
    def left(self) -> int:
        """How many of the scripted faults didn't come yet."""
        with self._lock:
            return len(self._script)

    def choose(self, request: Request) -> str | None:
        """The fault that is to befall a request."""
        with self._lock:
            self.seen.append(request)
            kind = self._scripted(request) or self._by_chance(request)
            if kind is None:
                self._in_a_row.pop(request, None)
            else:
                self._in_a_row[request] += 1
                self.injected[kind] += 1
            return kind

    def _scripted(self, request: Request) -> str | None:
        for i, (kind, where) in enumerate(self._script):
            if where(request):
                del self._script[i]
                return kind
        return None

    def _by_chance(self, request: Request) -> str | None:
        if not self._rate:
            return None
        self._times[request] += 1
        choice = random.Random(f"{self._seed} {request} {self._times[request]}")
        if choice.random() >= self._rate or self._in_a_row[request] >= self._most:
            return None
        return choice.choice(self._kinds)

    def upstream_failed(self) -> None:
        with self._lock:
            self.upstream_failures += 1


def _known(kinds: tuple[str, ...]) -> tuple[str, ...]:
    assert set(kinds) <= set(ALL_KINDS), kinds
    return kinds


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().close_request(request)

    def end_connections(self) -> None:
        """Ends those that clients keep for their next request."""
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not self.proxy.closing.is_set():
            super().handle_error(request, client_address)


class _ClientGoneError(Exception):
    """The client closed its connection."""


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, kept alive from request to request."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with contextlib.suppress(_ClientGoneError, ConnectionError):
            super().handle()

    def handle_expect_100(self) -> bool:
        return True  # told by the server, once it is asked

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _handle(self) -> None:
        proxy = self.server.proxy
        self._request = Request(self.command, self.path, self.headers.get("Range"))
        kind = proxy.choose(self._request)
        self._expects = self.headers.get("Expect", "").lower() == "100-continue"
        if kind in _ANSWERS:
            self._refuse(*_ANSWERS[kind])
        elif kind == "reset":
            self._reset()
        else:
            if kind == "delay":
                proxy.closing.wait(proxy.delay_seconds)
            try:
                self._pass_on(kind)
            except (OSError, HTTPException):
                if not proxy.closing.is_set():
                    proxy.upstream_failed()
                self._reset()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answers as S3 does, which doesn't ask for the body that a client is about to send."""
        if self._expects:
            self.close_connection = True
        else:
            for _ in self._body():
                pass
        text = f"<Code>{code}</Code><Message>{message}</Message><Resource>{escape(self.path)}</Resource>"
        xml = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{text}<RequestId>0</RequestId></Error>'
        body = b"" if self.command == "HEAD" else xml.encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        self._answer(status, code, headers)
        self._send(body)

    def _reset(self) -> None:
        """Resets the connection (RST), whatever has been sent."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            descriptor = self.connection.detach()  # else it stays open while rfile is
            with socket.socket(fileno=descriptor) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _pass_on(self, kind: str | None) -> None:
        # A connection of its own for each request: one that was kept might fail by itself.
        upstream = HTTPConnection(*self.server.proxy.upstream, timeout=_TIMEOUT)
        with contextlib.closing(upstream):
            upstream.connect()
            upstream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._send_upstream(upstream)
            with contextlib.closing(upstream.getresponse()) as response:  # has taken the connection over
                if response.status == HTTPStatus.NOT_FOUND:
                    self.server.proxy.missing.add(self._request)
                if kind == "lost_answer":
                    response.read()
                    self._reset()
                else:
                    self._send_back(response, kind)

    def _send_upstream(self, upstream: HTTPConnection) -> None:
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _OF_ONE_CONNECTION:
                upstream.putheader(name, value)
        chunked = self._is_chunked()
        if chunked:
            upstream.putheader("Transfer-Encoding", "chunked")
        upstream.putheader("Connection", "close")
        upstream.endheaders()
        if self._expects:
            if not upstream.sock.recv(12, socket.MSG_PEEK | socket.MSG_WAITALL).endswith(b" 100"):
                self.close_connection = True  # it is answered already, and the body isn't wanted
                return
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        wanted = True
        for piece in self._body():
            if wanted:
                try:
                    upstream.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                except ConnectionError:  # it may have answered already, and not want the rest
                    wanted = False
        if chunked and wanted:
            upstream.send(b"0\r\n\r\n")

    def _send_back(self, response: HTTPResponse, kind: str | None) -> None:
        cut = kind in ("truncated", "no_body", "no_head")
        headers = [x for x in response.getheaders() if x[0].lower() not in _OF_ONE_CONNECTION]
        length, body = response.length, b""
        if self.command == "HEAD" or response.status in (204, 304):
            length = 0
        elif length is None:
            body = response.read()
            length = len(body)
            headers.append(("Content-Length", str(length)))
        if kind == "no_head":
            self._send(f"HTTP/1.1 {response.status} {response.reason}\r\n".encode())
        elif cut and not length:
            return self._reset()
        else:
            self._answer(response.status, response.reason, headers)
        left = length // 2 if kind == "truncated" else 0 if cut else length
        while left:
            piece = (body or response.read(_PIECE))[:left]
            if not piece:  # the server itself broke off
                raise ConnectionError
            self._send(piece)
            left -= len(piece)
        if cut:
            self.close_connection = True
        return None

    def _is_chunked(self) -> bool:
        return "chunked" in self.headers.get("Transfer-Encoding", "").lower()

    def _body(self) -> Iterator[bytes]:
        """The request's body, without the framing of its chunks."""
        if self._is_chunked():
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield from self._received(size)
                self.rfile.readline()
            while self.rfile.readline().strip():  # trailers
                pass
        else:
            yield from self._received(int(self.headers.get("Content-Length", "0")))

    def _received(self, size: int) -> Iterator[bytes]:
        while size:
            try:
                piece = self.rfile.read(min(size, _PIECE))
            except OSError as error:
                raise _ClientGoneError from error
            if not piece:
                raise _ClientGoneError
            size -= len(piece)
            yield piece

    def _answer(self, status: int, reason: str, headers: list[tuple[str, str]]) -> None:
        self.send_response_only(status, reason)
        for name, value in headers:
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        try:
            self.end_headers()
        except OSError as error:
            raise _ClientGoneError from error

    def _send(self, data: bytes) -> None:
        try:
            self.wfile.write(data)
        except OSError as error:
            raise _ClientGoneError from error
