from __future__ import annotations

import logging
import sys
import time
import unicodedata
from io import StringIO

import pytest

from jobs.console import OneLineFormatter, exit_on_error, print_line, print_log
from pipeline.report.charts import truncate_label
from pipeline.text import escape_unprintable, remove_secrets, single_line

PERSIAN = "\u0645\u06cc\u200c\u0631\u0648\u062f"  # with a zero-width non-joiner
VISIBLE = [
    "s3://b/Größe [x] 50 % & more.tar",
    "日本語\u3000写真",  # a wide space
    "12\u00a0345",
    PERSIAN,
    "क्\u200dष",  # Hindi, with a zero-width joiner
    "ภาษาไทย עברית العربية 한국어",
    "e\u0301",  # a combining accent
    "\U0001f600\U0001f44d\U0001f3fd❤\ufe0f",  # with a skin tone, and with a variation selector
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",  # a family
    "\U0001f1e9\U0001f1ea",
    "C:\\x1b",
]
INVISIBLE = {
    "line\nbreak\r": r"line\nbreak\r",
    "\x1b[2J\x07\x00\x7f\x9b": r"\x1b[2J\x07\x00\x7f\x9b",
    "photo\u202egpj.exe": r"photo\u202egpj.exe",  # right-to-left override
    "\u2066a\u2069\u200e\u200f\u061c": r"\u2066a\u2069\u200e\u200f\u061c",
    "cat\u200b": r"cat\u200b",  # zero-width spaces and joiners
    "c\u200dat": r"c\u200dat",
    "é\u200dt": r"é\u200dt",
    "\u200d\U0001f600": r"\u200d" + "\U0001f600",
    "\U0001f600\u200d": "\U0001f600" + r"\u200d",
    "日\u200d\u200d本": r"日\u200d\u200d本",
    "\ufeffcat\u2060\u00ad": r"\ufeffcat\u2060\xad",
    "cat\U000e0061\U000e0062": r"cat\U000e0061\U000e0062",  # tags without a flag
    "\u2028\u2029": r"\u2028\u2029",
    "\ud800": r"\ud800",
    "\ue000\uffff\U0010ffff": r"\ue000\uffff\U0010ffff",
}


@pytest.mark.parametrize("text", VISIBLE)
def test_visible_text_is_unchanged(text: str) -> None:
    assert escape_unprintable(text) == text


@pytest.mark.parametrize(("text", "shown"), INVISIBLE.items(), ids=map(ascii, INVISIBLE))
def test_invisible_characters_are_escaped(text: str, shown: str) -> None:
    assert escape_unprintable(text) == shown
    assert escape_unprintable(shown) == shown


def test_every_invisible_unicode_character_is_escaped() -> None:
    for code in (*range(0x20000), *range(0xE0000, 0xE0200), 0xF0000, sys.maxunicode):
        shown = escape_unprintable(f"a{chr(code)}b")
        assert "\n" not in shown
        assert not [c for c in shown if unicodedata.category(c)[0] == "C"], hex(code)


def test_terminal_logs_charts_and_predictions_escape_alike(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"\U0001f469\u200d\U0001f467 {PERSIAN} photo\u202egpj.exe\x1b[2J[bold]\n"
    shown = f"\U0001f469\u200d\U0001f467 {PERSIAN} photo\\u202egpj.exe\\x1b[2J[bold]\\n"
    print_line(name)
    assert capsys.readouterr().out == f"{shown}\n"
    print_log(f"{name}\ttwo\r\nthree\r")
    assert capsys.readouterr().out == f"{shown[:-2]}\n\ttwo\nthree\n"
    record = OneLineFormatter("%(message)s").formatMessage
    assert record(_record(name)) == shown
    assert truncate_label(name, 100) == shown
    assert single_line(f"cannot decode: {name}") == f"cannot decode: {shown[:-2]}"


def _record(message: str) -> logging.LogRecord:
    record = logging.LogRecord("cvt_label", logging.INFO, "", 0, message, (), None)
    record.message = message
    return record


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:PW@host:1/x: refused", "http://***@host:1/x: refused"),
        ("s3://KEY:PW/P+W@bucket/x", "s3://***@bucket/x"),
        ("redis://:PW@host", "redis://***@host"),
        ("https://PW@host/x", "https://***@host/x"),
        ("cannot reach me:PW@proxy:3128", "cannot reach ***@proxy:3128"),
        ("s3:/KEY:PW@bucket", "s3:/***@bucket"),
        ("ProxyError('http://me:PW%40@p:1')", "ProxyError('http://***@p:1')"),
        ("GET /x?token=PW&part=1 failed", "GET /x?token=***&part=1 failed"),
        ("X-Amz-Credential=PW/s3&X-Amz-Signature=PW", "X-Amz-Credential=***&X-Amz-Signature=***"),
        ("https://a/b?sv=1&sig=PW%3D", "https://a/b?sv=1&sig=***"),
        ("https://a/b?sig=PW:PW: the object has changed", "https://a/b?sig=***: the object has changed"),
        ("AWS_SECRET_ACCESS_KEY=PW", "AWS_SECRET_ACCESS_KEY=***"),
        ("https://user:PW@PW@host/x", "https://***@host/x"),
        ("https://me:PW?PW#PW@host/x", "https://***@host/x"),
        ("https://me:PW@host:1/scene:left@2x.png", "https://***@host:1/scene:left@2x.png"),
        ("proxies=a,me:PW/PW@proxy:3128", "proxies=a,***@proxy:3128"),
        ("file=s3://KEY:PW/PW@bucket", "file=s3://***@bucket"),
        ("{'Authorization': 'Bearer PW'}", "{'Authorization': 'Bearer ***'}"),
        ("b'authorization': b'Bearer PW'", "b'authorization': b'Bearer ***'"),
        ("[(b'Authorization', b'Bearer PW')]", "[(b'Authorization', b'Bearer ***')]"),
        ("Authorization: token PW", "Authorization: token ***"),
        ("Proxy-Authorization: Other PW", "Proxy-Authorization: ***"),
        ("client_secret='PW', a='b'", "client_secret='***', a='b'"),
        ("password = 'PW, \"PW' and more", "password = '***' and more"),
        ('{"aws_secret_access_key": "PW", "a": "b"}', '{"aws_secret_access_key": "***", "a": "b"}'),
        ('{"SecretAccessKey":"PW","SessionToken":"PW"}', '{"SecretAccessKey":"***","SessionToken":"***"}'),
        ("x-amz-security-token: PW\nhost: a", "x-amz-security-token: ***\nhost: a"),
        ("MINIO_SECRET_KEY=PW", "MINIO_SECRET_KEY=***"),
    ],
)
def test_secrets_are_replaced(text: str, shown: str) -> None:
    assert remove_secrets(text) == shown
    assert "PW" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/me@home/a.tar: no such object",
        "cannot reach http://127.0.0.1:8333: me@home",
        "http://host:8080/path/a@b",
        "microsoft/cvt-13@main",
        "12:30 a@b; line 3: s3://b/a@b",
        "design=1, a:b, user@host",
        "s3://b/scene:12@0.jpg",
        "/data/scene:left@2x.png: cannot decode",
        "cannot read 'data/scene:left@2x.png'",
        "s3://b/day=a:b@2x.jpg",
        "http://host:8080?x=a:b@c",
        "s3://b/token=3/x.jpg",
        "s3://b/my-token: no such object",
        "a token, and the token is missing; authorization failed for s3://b",
    ],
)
def test_text_without_secrets_is_unchanged(text: str) -> None:
    assert remove_secrets(text) == text


def test_log_of_a_job_is_shown_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    print_log("GET /x?token=PW\nme:PW@proxy\r\n")
    assert capsys.readouterr().out == "GET /x?token=***\n***@proxy\n"


def test_handlers_of_libraries_show_no_secret() -> None:
    logger, handler = logging.getLogger("library"), logging.StreamHandler(StringIO())
    logger.addHandler(handler)
    logger.propagate = False
    with exit_on_error():
        logger.warning("GET /x?%s=%s", "token", "PW")
    assert handler.stream.getvalue() == "GET /x?token=***\n"


def test_long_text_is_searched_for_secrets_in_little_time() -> None:
    started = time.process_time()
    for part in (
        "/a:",
        "(",
        "://",
        "a-",
        "@",
        "token=",
        "a:b,",
        "a=",
        'token: "',
        "authorization: ",
        " a://b:",
    ):
        remove_secrets(part * 3_000)
    assert time.process_time() - started < 2
