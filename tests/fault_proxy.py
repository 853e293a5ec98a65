"""A loopback HTTP proxy in front of the S3 server that makes requests fail, scripted or at random.

It also drips, floods, and lies, as broken or hostile stores and proxies do.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
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

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

_ERROR_RESPONSES = {
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "denied": (403, "AccessDenied", "Access Denied"),
    "not_implemented": (501, "NotImplemented", "A header implies functionality that is not implemented"),
    "refused": (412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold"),
}

#: error, slow_down, denied: an error response of S3; the request is not forwarded. reset: the connection is
#: reset; the request is not forwarded. lost_answer: the request is executed, then the connection is reset
#: before any response. truncated: half of the body of the response, then the connection ends. no_body: only
#: the headers of the response, then the connection ends. For truncated and no_body, responses without a body
#: are lost. no_head: only the status line, then the connection ends; a client needs nothing more for a
#: DELETE. delay: a delayed response.
ALL_KINDS = (
    *("error", "slow_down", "denied"),
    *("reset", "lost_answer", "truncated", "no_body", "no_head", "delay"),
)

#: drip: the response comes byte by byte. drip_body: the headers come at once, and the body byte by byte.
#: stall: no response. slow_upload: the request is read byte by byte. flood: a body without end.
#: continue_cut: the connection ends within the header "100 Continue".
SLOW_KINDS = ("drip", "drip_body", "stall", "slow_upload", "flood", "continue_cut")

Headers = dict[str, str]
_TOKEN = rb"<NextContinuationToken>.*?</NextContinuationToken>"


def _with_header(name: str, value: str | None) -> Callable[[Headers, bytes], tuple[Headers, bytes]]:
    """Returns a lie about one header; `{}` in the value is the true value."""

    def lie(headers: Headers, body: bytes) -> tuple[Headers, bytes]:
        if name in headers and value is None:
            del headers[name]
        elif name in headers:
            headers[name] = str(value).format(headers[name])
        return headers, body

    return lie


def _with_body(change: Callable[[bytes], bytes]) -> Callable[[Headers, bytes], tuple[Headers, bytes]]:
    """Returns a lie about the body, with a matching length."""

    def lie(headers: Headers, body: bytes) -> tuple[Headers, bytes]:
        changed = change(body)
        return headers | ({"Content-Length": str(len(changed))} if body else {}), changed if body else body

    return lie


def _truncated_listing(token: bytes) -> Callable[[bytes], bytes]:
    def change(body: bytes) -> bytes:
        body = re.sub(_TOKEN, b"", body).replace(b"<IsTruncated>false", b"<IsTruncated>true")
        return body.replace(b"</ListBucketResult>", token + b"</ListBucketResult>")

    return change


_ENTITIES = b"".join(b'<!ENTITY e%d "%b">' % (i, b"&e%d;" % (i - 1) * 10) for i in range(1, 10))
_ENTITY_BOMB = b'<!DOCTYPE x [<!ENTITY e0 "0123456789">%b]><Error><Code>&e9;</Code></Error>' % _ENTITIES

#: Changes of headers (in title case) and body of a response. The request is executed.
LIES: dict[str, Callable[[Headers, bytes], tuple[Headers, bytes]]] = {
    "weak_etag": _with_header("Etag", "W/{}"),
    "other_etag": _with_header("Etag", '"0123456789abcdef0123456789abcdef"'),
    "empty_etag": _with_header("Etag", '""'),
    "no_etag": _with_header("Etag", None),
    "longer": _with_header("Content-Length", "1{}"),
    "zero_length": lambda headers, body: (headers if body else headers | {"Content-Length": "0"}, body),
    "no_length": _with_header("Content-Length", "x"),
    "other_range": _with_header("Content-Range", "bytes 1-3/10"),
    "other_size": _with_header("Content-Range", "bytes 0-9/11"),
    "shorter": _with_body(lambda body: body[:-3]),
    "sign_in_page": _with_body(lambda body: b"<html>Sign in to this network</html>"),
    "entity_bomb": _with_body(lambda body: _ENTITY_BOMB),
    "wrong_number": _with_body(lambda body: re.sub(b"<Size>.*?</Size>", b"<Size>many</Size>", body)),
    "other_keys": _with_body(lambda body: body.replace(b"<Key>", b"<Key>elsewhere/")),
    "no_token": _with_body(_truncated_listing(b"")),
    "same_token": _with_body(
        _truncated_listing(b"<NextContinuationToken>again</NextContinuationToken>")
    ),
    "empty_pages": _with_body(
        lambda body: re.sub(
            rb"<(Contents|CommonPrefixes)>.*</\1>",
            b"",
            _truncated_listing(
                b"<NextContinuationToken>%016x</NextContinuationToken>" % random.getrandbits(64)
            )(body),
        )
    ),
}  # fmt: skip

#: Request headers that a request loses on its way.
DROPPED_HEADERS = {
    "ignored_conditions": ("If-Match", "If-None-Match"),
    "ignored_range": ("Range",),
}

_KNOWN_KINDS = {*ALL_KINDS, *_ERROR_RESPONSES, *SLOW_KINDS, *LIES, *DROPPED_HEADERS}
_CHUNK_BYTES = 256 * 1024
_TIMEOUT_S = 120.0
_HOP_BY_HOP_HEADERS = {"connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"}


@dataclass(frozen=True)
class Request:
    """The properties of a request that determine its fault."""

    method: str
    path: str  # with the query, as sent
    range: str | None


class FaultProxy:
    """Forwards HTTP to `upstream_url` with faults: `with FaultProxy(s3.endpoint_url) as proxy: ...`.

    Every request gets a random fault with probability `rate`. The choice depends on the seed, the request and
    the number of its repetitions, not on the order of threads. The same request gets at most `max_in_a_row`
    faults in a row.

    Attributes:
        url: endpoint for clients. Clients sign for this endpoint; the Host header is forwarded as sent.
        injected: number of injected faults, by kind.
        seen: the last requests.
        missing: requests that the server answered with 404.
        before: is called before a request is forwarded; a `ConnectionError` drops the request.
        after: is called when a request was executed, before the client gets the response.
        upstream_failures: number of failures of the server itself; the client's connection is then reset.
    """

    def __init__(
        self,
        upstream_url: str,
        seed: int = 0,
        rate: float = 0.0,
        kinds: tuple[str, ...] = ALL_KINDS,
        max_in_a_row: int = 3,
        delay_seconds: float = 0.3,
        drip_seconds: float = 0.02,
    ) -> None:
        parts = urlsplit(upstream_url)
        assert parts.scheme == "http", upstream_url
        self.upstream = (parts.hostname or "", parts.port or 80)
        self.delay_seconds = delay_seconds
        self.drip_seconds = drip_seconds
        self.injected: Counter[str] = Counter()
        self.seen: deque[Request] = deque(maxlen=100_000)
        self.missing: set[Request] = set()
        self.upstream_failures = 0
        self.before: Callable[[Request], None] = lambda _: None
        self.after: Callable[[Request], None] = lambda _: None
        self.closing = threading.Event()
        self._seed = seed
        self._rate = rate
        self._kinds = _known(kinds)
        self._max_in_a_row = max_in_a_row
        self._lock = threading.Lock()
        self._script: list[tuple[str, Callable[[Request], bool]]] = []
        self._always: list[tuple[str, Callable[[Request], bool]]] = []
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
        """Injects these faults, in order, into the next matching requests; they precede random faults."""
        with self._lock:
            self._script += [(kind, where) for kind in _known(kinds)]

    def always(self, kind: str, where: Callable[[Request], bool] = lambda _: True) -> None:
        """Injects this fault into all matching requests that have no scripted fault."""
        with self._lock:
            self._always += [(kind, where) for kind in _known((kind,))]

    def clear(self) -> None:
        """Resets the script and all counters."""
        with self._lock:
            self._script.clear()
            self._always.clear()
            self._times.clear()
            self._in_a_row.clear()
            self.injected.clear()
            self.seen.clear()
            self.missing.clear()
            self.upstream_failures = 0

    @property
    def remaining(self) -> int:
        """Number of scripted faults that were not injected yet."""
        with self._lock:
            return len(self._script)

    def choose(self, request: Request) -> str | None:
        """Returns the fault of a request."""
        with self._lock:
            self.seen.append(request)
            kind = self._scripted(request) or self._random_fault(request)
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
        return next((kind for kind, where in self._always if where(request)), None)

    def _random_fault(self, request: Request) -> str | None:
        if not self._rate:
            return None
        self._times[request] += 1
        choice = random.Random(f"{self._seed} {request} {self._times[request]}")
        if choice.random() >= self._rate or self._in_a_row[request] >= self._max_in_a_row:
            return None
        return choice.choice(self._kinds)

    def upstream_failed(self) -> None:
        with self._lock:
            self.upstream_failures += 1


def _known(kinds: tuple[str, ...]) -> tuple[str, ...]:
    assert set(kinds) <= _KNOWN_KINDS, kinds
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
        """Closes the connections that clients keep open."""
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
    """One keep-alive connection of a client."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with contextlib.suppress(_ClientGoneError, ConnectionError):
            super().handle()

    def handle_expect_100(self) -> bool:
        return True  # forwarded from the server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _handle(self) -> None:
        proxy = self.server.proxy
        self._request = Request(self.command, self.path, self.headers.get("Range"))
        kind = self._kind = proxy.choose(self._request)
        self._expects = self.headers.get("Expect", "").lower() == "100-continue"
        if kind in _ERROR_RESPONSES:
            self._send_error(*_ERROR_RESPONSES[kind])
        elif kind == "reset":
            self._reset()
        elif kind == "stall":
            self._stall()
        elif kind == "continue_cut" and self._expects:
            self._send(b"HTTP/1.1 100 Continue\r\n")
            self.close_connection = True
        else:
            if kind == "delay":
                proxy.closing.wait(proxy.delay_seconds)
            proxy.before(self._request)
            try:
                self._forward(kind)
            except (OSError, HTTPException):
                if not proxy.closing.is_set():
                    proxy.upstream_failed()
                self._reset()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815

    def _send_error(self, status: int, code: str, message: str) -> None:
        """Responds as S3 does, which does not request the body that the client would send."""
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
        """Resets the connection (RST)."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            descriptor = self.connection.detach()  # otherwise it stays open as long as rfile
            with socket.socket(fileno=descriptor) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _forward(self, kind: str | None) -> None:
        # A new connection for each request: a kept connection could fail by itself.
        upstream = HTTPConnection(*self.server.proxy.upstream, timeout=_TIMEOUT_S)
        with contextlib.closing(upstream):
            upstream.connect()
            upstream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._send_upstream(upstream, DROPPED_HEADERS.get(kind or "", ()))
            with contextlib.closing(upstream.getresponse()) as response:  # owns the connection now
                if response.status == HTTPStatus.NOT_FOUND:
                    self.server.proxy.missing.add(self._request)
                self.server.proxy.after(self._request)
                if kind == "lost_answer":
                    response.read()
                    self._reset()
                else:
                    self._send_back(response, kind)

    def _send_upstream(self, upstream: HTTPConnection, dropped: tuple[str, ...]) -> None:
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        headers = [x for x in self.headers.items() if x[0].lower() not in _HOP_BY_HOP_HEADERS]
        if any(name.title() in dropped for name, _ in headers):
            headers = self._signed_without(dropped, headers)
        for name, value in headers:
            upstream.putheader(name, value)
        chunked = self._is_chunked()
        if chunked:
            upstream.putheader("Transfer-Encoding", "chunked")
        upstream.putheader("Connection", "close")
        upstream.endheaders()
        if self._expects:
            if not upstream.sock.recv(12, socket.MSG_PEEK | socket.MSG_WAITALL).endswith(b" 100"):
                self.close_connection = True  # the server has responded, and does not want the body
                return
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        wants_body = True
        for piece in self._body():
            if wants_body:
                try:
                    upstream.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                except ConnectionError:  # the server may have responded, and not want the rest
                    wants_body = False
        if chunked and wants_body:
            upstream.send(b"0\r\n\r\n")

    def _signed_without(
        self, dropped: tuple[str, ...], headers: list[tuple[str, str]]
    ) -> list[tuple[str, str]]:
        """Returns the headers of the request without some, signed again: S3's signature covers them."""
        hashed = self.headers["X-Amz-Content-SHA256"]

        class Signer(S3SigV4Auth):  # type: ignore[misc]
            def payload(self, request: object) -> str:
                return hashed

        kept = {name: value for name, value in headers if name.title() not in (*dropped, "Authorization")}
        request = AWSRequest(self.command, f"http://{self.headers['Host']}{self.path}", kept)
        key = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
        region = self.headers["Authorization"].split("/")[2]
        Signer(key, "s3", region).add_auth(request)
        return [(name, value) for name, value in request.headers.items() if name != "Host"] + [
            ("Host", self.headers["Host"])
        ]

    def _send_back(self, response: HTTPResponse, kind: str | None) -> None:
        cut = kind in ("truncated", "no_body", "no_head")
        headers = [x for x in response.getheaders() if x[0].lower() not in _HOP_BY_HOP_HEADERS]
        if kind in LIES or kind in SLOW_KINDS:
            return self._send_changed(response, headers, kind)
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
        remaining = length // 2 if kind == "truncated" else 0 if cut else length
        while remaining:
            piece = (body or response.read(_CHUNK_BYTES))[:remaining]
            if not piece:  # the server itself failed
                raise ConnectionError
            self._send(piece)
            remaining -= len(piece)
        if cut:
            self.close_connection = True
        return None

    def _send_changed(self, response: HTTPResponse, sent: list[tuple[str, str]], kind: str) -> None:
        """Sends a response that lies, drips, or has no end."""
        body = response.read()
        headers = {name.title(): value for name, value in sent}
        if self.command != "HEAD":
            headers["Content-Length"] = str(len(body))
        if kind in LIES:
            headers, body = LIES[kind](headers, body)
        if kind == "flood":
            headers["Content-Length"] = str(10**12)
        self.close_connection = True
        status = f"HTTP/1.1 {response.status} {response.reason}\r\n"
        head = status + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
        if kind == "drip":
            return self._drip(head.encode() + body)
        self._send(head.encode())
        if kind == "drip_body":
            return self._drip(body)
        self._send(body)
        while kind == "flood" and self.command != "HEAD":
            self._send(b"<x/>" * 16_384)
        return None

    def _drip(self, data: bytes) -> None:
        for byte in data:
            if not self._pause():
                break
            self._send(bytes([byte]))

    def _stall(self) -> None:
        """Sends nothing until the client or the proxy closes the connection."""
        hang_up = select.poll()
        hang_up.register(self.connection, select.POLLRDHUP)
        while self._pause() and not hang_up.poll(0):
            pass
        self.close_connection = True

    def _pause(self) -> bool:
        """Waits for the time of one byte; returns whether the proxy is still open."""
        return not self.server.proxy.closing.wait(self.server.proxy.drip_seconds)

    def _is_chunked(self) -> bool:
        return "chunked" in self.headers.get("Transfer-Encoding", "").lower()

    def _body(self) -> Iterator[bytes]:
        """Yields the body of the request, without chunk framing."""
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
            if self._kind == "slow_upload":
                self._pause()
            try:
                piece = self.rfile.read(1 if self._kind == "slow_upload" else min(size, _CHUNK_BYTES))
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
