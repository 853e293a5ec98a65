"""A loopback HTTP server with scripted answers, which records the requests and how many were concurrent."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self


@dataclass(frozen=True)
class Answer:
    """One answer of the server.

    Attributes:
        length: Value of `Content-Length`; "" sends a chunked body without a length.
        delay_s: Seconds before the answer.
        byte_pause_s: Seconds before each byte of the body.
        reset: Reset the connection instead of an answer.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    length: str | None = None
    delay_s: float = 0
    byte_pause_s: float = 0
    reset: bool = False


class Request(NamedTuple):
    method: str
    path: str  # with the query, as sent
    headers: Mapping[str, str]


class HttpServer:
    """`with HttpServer() as server: ...` serves `answers`, by path; another path has status 404.

    The answers of a path are given in order, and the last one is repeated.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.answers: dict[str, deque[Answer]] = {}
        self.requests: list[Request] = []
        self.max_concurrent = self._concurrent = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._handle(self)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 256

            def handle_error(self, *_: Any) -> None:  # a client ended the connection
                pass

        self._server = Server((host, 0), Handler)
        self.url = f"http://{host}:{self._server.server_port}"

    def add(self, path: str, *answers: Answer) -> str:
        """Sets the answers of a path; returns its URI."""
        self.answers[path] = deque(answers)
        return self.url + path

    def count(self) -> Counter[str]:
        """Returns the number of requests by path."""
        return Counter(request.path for request in self.requests)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.socket.close()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.requests.append(Request(handler.command, handler.path, dict(handler.headers)))
            answers = self.answers.get(handler.path.partition("?")[0], deque([Answer(status=404)]))
            answer = answers.popleft() if len(answers) > 1 else answers[0]
            self._concurrent += 1
            self.max_concurrent = max(self.max_concurrent, self._concurrent)
        try:
            time.sleep(answer.delay_s)
        finally:
            with self._lock:  # the client sees the end of the answer later
                self._concurrent -= 1
        self._send(handler, answer)

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        if answer.reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            handler.connection.close()
            return
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        if answer.length == "":
            handler.send_header("Transfer-Encoding", "chunked")
        else:
            handler.send_header("Content-Length", answer.length or str(len(answer.body)))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if answer.length == "":
            handler.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(answer.body), answer.body))
        elif answer.byte_pause_s:
            for byte in answer.body:
                time.sleep(answer.byte_pause_s)
                handler.wfile.write(bytes([byte]))
        else:
            handler.wfile.write(answer.body)
        handler.close_connection = answer.length not in (None, "")
