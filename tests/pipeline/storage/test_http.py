"""Concurrent downloads from a real HTTP server on the loopback interface."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from pipeline.storage import (
    AccessDenied,
    ObjectNotFound,
    ObjectTooLarge,
    Storage,
    StorageError,
    http,
)
from pipeline.storage.http import Download, Downloader
from tests.http_server import Answer, HttpServer
from tests.pipeline.storage.operations import RetryCounter

MAX = 1000
SECRET = "?X-Amz-Signature=planted&hdnts=planted"


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with HttpServer() as server:
        yield server


@pytest.fixture
def downloader() -> Iterator[Downloader]:
    with Storage(request_timeout_s=20).downloader() as downloader:
        yield downloader


def fetch(downloader: Downloader, uri: str, max_bytes: int = MAX) -> Download:
    return downloader.download(uri, max_bytes).result(timeout=60)


def test_results_keep_the_order_of_requests(server: HttpServer, downloader: Downloader) -> None:
    uris = [server.add(f"/{i}", Answer(b"%d" % i, delay_s=0.01 * (7 - i % 8))) for i in range(100)]
    futures = [downloader.download(uri, MAX) for uri in uris]
    assert [future.result().content for future in futures] == [b"%d" % i for i in range(100)]
    assert server.count() == Counter({f"/{i}": 1 for i in range(100)})


def test_limit_per_host_and_limit_of_all_hold() -> None:
    with HttpServer() as one, HttpServer() as two, HttpServer() as three:
        servers = one, two, three
        uris = [s.add(f"/{i}", Answer(b"x", delay_s=0.02)) for i in range(20) for s in servers]
        with Storage().downloader(64, downloads_per_host=4) as downloader:
            for future in [downloader.download(uri, MAX) for uri in uris]:
                future.result()
        assert max(s.max_concurrent for s in servers) == 4
    with HttpServer() as alone, Storage().downloader(3, 16) as downloader:
        uris = [alone.add(f"/{i}", Answer(b"x", delay_s=0.02)) for i in range(20)]
        for future in [downloader.download(uri, MAX) for uri in uris]:
            future.result()
        assert alone.max_concurrent == 3


def test_slow_host_does_not_hold_up_another() -> None:
    with HttpServer() as slow, HttpServer() as fast, Storage().downloader(8, 4) as downloader:
        waiting = [downloader.download(slow.add(f"/{i}", Answer(b"x", delay_s=8)), MAX) for i in range(12)]
        quick = [downloader.download(fast.add(f"/{i}", Answer(b"x")), MAX) for i in range(50)]
        for future in quick:
            future.result(timeout=7)
        assert not any(future.done() for future in waiting)
        assert slow.max_concurrent == 4


@pytest.mark.parametrize("size", [MAX, MAX + 1])
@pytest.mark.parametrize("length", [None, ""], ids=["length", "chunked"])
def test_size_is_limited(server: HttpServer, downloader: Downloader, size: int, length: str | None) -> None:
    uri = server.add("/x", Answer(b"x" * size, length=length))
    if size <= MAX:
        assert fetch(downloader, uri).content == b"x" * size
    else:
        with pytest.raises(ObjectTooLarge, match=r"x: the object has more than 1,000 bytes"):
            fetch(downloader, uri)
        assert server.count()["/x"] == 1


def test_body_over_the_limit_is_not_read(server: HttpServer, downloader: Downloader) -> None:
    """The stated length is enough, before the first of the slow bytes."""
    uri = server.add("/x", Answer(b"x" * 2000, byte_pause_s=0.01))
    started = time.monotonic()
    with pytest.raises(ObjectTooLarge, match="the object has more than 1,000 bytes"):
        fetch(downloader, uri)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("status", "failure", "requests"),
    [
        *((status, ObjectNotFound, 1) for status in (404, 410)),
        *((status, AccessDenied, 1) for status in (401, 403, 407, 451)),
        *((status, StorageError, 1) for status in (400, 418)),
        *((status, StorageError, 4) for status in (408, 500, 503)),
        (429, StorageError, 10),
    ],
)
def test_status_has_its_error_and_number_of_attempts(
    server: HttpServer, downloader: Downloader, status: int, failure: type[StorageError], requests: int
) -> None:
    uri = server.add("/x", Answer(status=status))
    with RetryCounter() as retries, pytest.raises(StorageError, match=f"HTTP {status}") as caught:
        fetch(downloader, uri + SECRET)
    assert type(caught.value) is failure
    assert str(caught.value).startswith(f"{uri}?...: ")
    assert "planted" not in str(caught.value)
    assert server.count() == {f"/x{SECRET}": requests}
    assert retries.counts == Counter({f"HTTP {status}": requests - 1} if requests > 1 else {})


@pytest.mark.parametrize(
    "answer",
    [
        Answer(status=408),
        Answer(status=429),
        Answer(status=500),
        Answer(status=503),
        Answer(reset=True),
        Answer(b"half", length="8"),
        Answer(b"half", length="many"),
    ],
    ids=lambda answer: f"{answer.status}-{answer.length}-{answer.reset}",
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_transient_failure_is_retried_and_counted(
    server: HttpServer, downloader: Downloader, answer: Answer, method: str
) -> None:
    uri = server.add("/x", answer, answer, Answer(b"good", headers={"ETag": '"1"'}))
    if method == "HEAD" and answer.length == "8":
        pytest.skip("HEAD has no body that ends early")
    with RetryCounter() as retries:
        version = (downloader.head(uri).result() if method == "HEAD" else fetch(downloader, uri)).version
    assert version == "1-4"
    assert retries.counts.total() == (1 if answer.reset else 2)  # aiohttp itself retries a reset once
    assert server.count()["/x"] == 3


@pytest.mark.parametrize("slow", [Answer(b"x", delay_s=3), Answer(b"x" * 90, byte_pause_s=0.04)])
def test_slow_response_is_a_timeout(server: HttpServer, slow: Answer) -> None:
    uri = server.add("/x", slow)
    with (
        Storage(request_timeout_s=0.3).downloader() as downloader,
        RetryCounter() as retries,
        pytest.raises(StorageError, match=r"timeout: .*\(storage\.request_timeout_s\)"),
    ):
        fetch(downloader, uri + SECRET)
    assert retries.counts.total() == 3
    assert server.count().total() == 4


def test_bytes_extend_the_time_limit(server: HttpServer) -> None:
    uri = server.add("/x", Answer(b"x" * 100, byte_pause_s=0.01))
    with Storage(request_timeout_s=0.4, min_bytes_per_s=50).downloader() as downloader:
        assert fetch(downloader, uri).content == b"x" * 100


def test_wait_for_the_host_does_not_count_as_slow(server: HttpServer) -> None:
    uris = [server.add(f"/{i}", Answer(b"x", delay_s=0.25)) for i in range(8)]
    with Storage(request_timeout_s=1).downloader(64, 1) as downloader, RetryCounter() as retries:
        for future in [downloader.download(uri, MAX) for uri in uris]:
            future.result()
    assert not retries.counts


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["/x", "x", "{url}/x?a=%2F", "//{host}/x"])
def test_redirect_is_followed(server: HttpServer, downloader: Downloader, status: int, location: str) -> None:
    host = server.url.partition("//")[2]
    target = location.format(url=server.url, host=host)
    server.add("/x", Answer(b"good", headers={"ETag": '"1"'}))
    uri = server.add("/r", Answer(b"moved", status=status, headers={"Location": target}))
    assert fetch(downloader, uri) == (b"good", "1-4")
    assert downloader.head(uri).result().version == "1-4"
    assert server.requests[1].path == ("/x?a=%2F" if "?" in location else "/x")


def test_number_of_redirects_is_limited(server: HttpServer, downloader: Downloader) -> None:
    for i in range(11):
        server.add(f"/{i}", Answer(status=302, headers={"Location": f"/{i + 1}"}))
    server.add("/11", Answer(b"good"))
    assert fetch(downloader, f"{server.url}/3").content == b"good"
    with pytest.raises(StorageError, match=r"/0: too many redirects: more than 9$"):
        fetch(downloader, f"{server.url}/0")


@pytest.mark.parametrize("location", ["ftp://x/y?planted", "file:///etc/passwd", "http://[planted"])
def test_redirect_outside_of_http_is_an_error(
    server: HttpServer, downloader: Downloader, location: str
) -> None:
    uri = server.add("/r", Answer(status=302, headers={"Location": location}))
    with pytest.raises(
        StorageError, match=r"r: the URI or its redirect is not a valid http\(s\) address"
    ) as caught:
        fetch(downloader, uri)
    assert "planted" not in str(caught.value)
    assert server.count()["/r"] == 1


@pytest.mark.parametrize(
    "uri", ["http://", "http://[x", "ftp://h/x", "http://h:99999/x", "", "http://\u2100/x"]
)
def test_invalid_uri_is_an_error(downloader: Downloader, uri: str) -> None:
    with pytest.raises(StorageError, match=r"not a valid http\(s\) address"):
        fetch(downloader, uri)


@pytest.mark.parametrize(
    ("path", "sent"),
    [("/a%2Fb?s=%2b+&t=%41", "/a%2Fb?s=%2b+&t=%41"), ("/sp ace/ü.jpg", "/sp%20ace/%C3%BC.jpg")],
)
def test_ascii_uri_is_sent_unchanged_and_another_is_quoted(
    server: HttpServer, downloader: Downloader, path: str, sent: str
) -> None:
    server.add(sent.partition("?")[0], Answer(b"good"))
    assert fetch(downloader, server.url + path + "#fragment").content == b"good"
    assert server.requests[0].path == sent


def test_request_names_the_product_and_no_compression(server: HttpServer, downloader: Downloader) -> None:
    fetch(downloader, server.add("/x", Answer(b"x", headers={"Set-Cookie": "a=b"})))
    fetch(downloader, f"{server.url}/x")
    assert server.requests[1].headers["User-Agent"].startswith("cvt-label")
    assert server.requests[1].headers["Accept-Encoding"] == "identity"
    assert "Cookie" not in server.requests[1].headers


@pytest.mark.parametrize(
    ("headers", "length", "version", "head_version"),
    [
        ({"ETag": '"abc-2"'}, None, "abc-2-4", "abc-2-4"),
        ({"ETag": 'W/"abc"'}, None, "abc-4", "abc-4"),
        ({"ETag": '"abc"'}, "", "abc-4", None),
        ({"ETag": '""'}, None, None, None),
        ({}, None, None, None),
    ],
)
def test_version_is_etag_and_size(
    server: HttpServer,
    downloader: Downloader,
    headers: dict[str, str],
    length: str | None,
    version: str | None,
    head_version: str | None,
) -> None:
    uri = server.add("/x", Answer(b"good", headers=headers, length=length))
    assert fetch(downloader, uri).version == version
    assert downloader.head(uri).result().version == head_version


def test_versions_take_one_concurrent_head_each(server: HttpServer, downloader: Downloader) -> None:
    uris = [server.add(f"/{i}", Answer(b"x" * i, headers={"ETag": '"e"'}, delay_s=0.05)) for i in range(40)]
    futures = [downloader.head(uri) for uri in uris]
    assert [future.result().version for future in futures] == [f"e-{i}" for i in range(40)]
    assert Counter(request.method for request in server.requests) == {"HEAD": 40}
    assert server.max_concurrent == 16


def test_version_of_a_missing_object_fails(server: HttpServer, downloader: Downloader) -> None:
    with pytest.raises(ObjectNotFound, match="HTTP 404"):
        downloader.head(f"{server.url}/none").result()


def test_compressed_response_is_an_error(server: HttpServer, downloader: Downloader) -> None:
    uri = server.add("/x", Answer(b"?", headers={"Content-Encoding": "br"}))
    with pytest.raises(StorageError, match="the Content-Encoding 'br' is not supported"):
        fetch(downloader, uri)
    assert server.count().total() == 1


def test_unreachable_and_unknown_hosts_fail_after_few_attempts(downloader: Downloader) -> None:
    with RetryCounter() as retries:
        with pytest.raises(StorageError, match=r"cannot connect to the host or proxy: .*127\.0\.0\.1"):
            fetch(downloader, "http://127.0.0.1:9/x")
        with pytest.raises(StorageError, match=r"cannot connect to the host or proxy: .*[Nn]ame") as caught:
            fetch(downloader, f"http://user:planted@no-such-host.invalid/x{SECRET}")
    assert "planted" not in str(caught.value)
    assert retries.counts == Counter(ClientConnectorError=3, ClientConnectorDNSError=3)


def test_requests_to_an_unreachable_host_are_not_repeated_for_every_image(
    downloader: Downloader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_MAX_FAILURES", 3)
    monkeypatch.setattr(http, "_unreachable", Counter())

    for expected in (3, 0):  # the first image has four attempts
        with RetryCounter() as retries:
            for number in range(3):
                with pytest.raises(StorageError, match="cannot connect"):
                    fetch(downloader, f"http://127.0.0.1:9/{number}.png")
        assert retries.counts.total() == expected


def test_tls_errors_are_explained(server: HttpServer, downloader: Downloader, tmp_path: Path) -> None:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out crt -days 1 -subj /CN=127.0.0.1"
    command += " -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    with HttpServer() as secure:
        secure._server.socket = context.wrap_socket(secure._server.socket, server_side=True)
        uri = secure.add("/x", Answer(b"good")).replace("http:", "https:")
        explained = r"certificate is not valid .*SSL_CERT_FILE"
        with RetryCounter() as retries, pytest.raises(StorageError, match=explained):
            fetch(downloader, uri)
        assert not retries.counts
        program = "from pipeline.storage import Storage; import sys\n"
        program += "with Storage().downloader() as d: print(d.download(sys.argv[1], 9).result().content)"
        environment = os.environ | {"SSL_CERT_FILE": str(tmp_path / "crt"), "PYTHONPATH": str(Path.cwd())}
        done = subprocess.run([sys.executable, "-c", program, uri], env=environment, capture_output=True)
        assert done.stdout == b"b'good'\n", done.stderr.decode()
    with RetryCounter() as retries, pytest.raises(StorageError, match=r"cannot connect to the host .*SSL"):
        fetch(downloader, server.url.replace("http:", "https:") + "/x")
    assert retries.counts.total() == 3


def test_proxy_of_the_environment_is_used(
    server: HttpServer, downloader: Downloader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url.replace("://", "://user:planted@"))
    monkeypatch.setenv("no_proxy", "direct.example")
    server.answers["http://elsewhere.example/x"] = server.answers["/x"] = deque([Answer(b"good")])
    assert fetch(downloader, "http://elsewhere.example/x").content == b"good"
    assert server.requests[0].headers["Proxy-Authorization"].startswith("Basic ")
    server.answers["http://elsewhere.example/x"] = deque([Answer(status=407)])
    with pytest.raises(AccessDenied, match="HTTP 407"):
        fetch(downloader, "http://elsewhere.example/x")
    monkeypatch.setenv("http_proxy", "http://user:planted@127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot connect to the host or proxy") as caught:
        fetch(downloader, "http://elsewhere.example/x")
    assert "planted" not in str(caught.value)
    monkeypatch.setenv("http_proxy", "socks5://user:planted@127.0.0.1:9")
    with pytest.raises(StorageError) as caught:
        fetch(downloader, "http://elsewhere.example/x")
    assert "planted" not in str(caught.value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert fetch(downloader, f"{server.url}/x").content == b"good"


def test_close_cancels_requests_and_ends_the_thread(server: HttpServer) -> None:
    before = set(threading.enumerate())
    uri = server.add("/x", Answer(b"x", delay_s=1))
    downloader = Storage().downloader()
    name = uri.replace("127.0.0.1", "localhost")  # a name is resolved in another thread
    futures = [downloader.download(name, MAX) for _ in range(30)]
    time.sleep(0.2)
    started = time.monotonic()
    downloader.close()
    downloader.close()
    assert time.monotonic() - started < 0.9
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(timeout=0)
    ours = [t for t in set(threading.enumerate()) - before if "process_request" not in t.name]
    assert ours == []


def test_forked_process_downloads_on_its_own(server: HttpServer, downloader: Downloader) -> None:
    uri = server.add("/x", Answer(b"good"))
    assert fetch(downloader, uri).content == b"good"
    if not (pid := os.fork()):
        status = 1
        try:
            with Storage().downloader() as own:
                status = int(fetch(own, uri).content != b"good")
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert fetch(downloader, uri).content == b"good"  # the connections of the parent still work
