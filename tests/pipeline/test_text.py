from __future__ import annotations

import logging
import sys
import unicodedata

import pytest

from jobs.console import OneLineFormatter, print_line, print_log
from pipeline.report.elements import truncate
from pipeline.text import escape_unprintable, single_line

PERSIAN = "\u0645\u06cc\u200c\u0631\u0648\u062f"  # with a zero-width non-joiner
WRITTEN = [
    "s3://b/Größe [x] 50 % & more.tar",
    "日本語\u3000写真",  # a wide space
    "12\u00a0345",
    PERSIAN,
    "क्\u200dष",  # Hindi, with a zero-width joiner
    "ภาษาไทย עברית العربية 한국어",
    "e\u0301",  # an accent on its own
    "\U0001f600\U0001f44d\U0001f3fd❤\ufe0f",  # with a skin, and as an emoji
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",  # a family
    "\U0001f1e9\U0001f1ea",
    "C:\\x1b",
]
HIDDEN = {
    "line\nbreak\r": r"line\nbreak\r",
    "\x1b[2J\x07\x00\x7f\x9b": r"\x1b[2J\x07\x00\x7f\x9b",
    "photo\u202egpj.exe": r"photo\u202egpj.exe",  # from right to left
    "\u2066a\u2069\u200e\u200f\u061c": r"\u2066a\u2069\u200e\u200f\u061c",
    "cat\u200b": r"cat\u200b",  # spaces and joiners of no width
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


@pytest.mark.parametrize("text", WRITTEN)
def test_what_people_write_stays_as_it_is(text: str) -> None:
    assert escape_unprintable(text) == text


@pytest.mark.parametrize(("text", "shown"), HIDDEN.items(), ids=map(ascii, HIDDEN))
def test_what_cannot_be_seen_is_written_out(text: str, shown: str) -> None:
    assert escape_unprintable(text) == shown
    assert escape_unprintable(shown) == shown


def test_no_character_of_unicode_hides_anything_by_itself() -> None:
    for code in (*range(0x20000), *range(0xE0000, 0xE0200), 0xF0000, sys.maxunicode):
        shown = escape_unprintable(f"a{chr(code)}b")
        assert "\n" not in shown
        assert not [c for c in shown if unicodedata.category(c)[0] == "C"], hex(code)


def test_terminals_logs_charts_and_prediction_files_follow_the_same_rule(
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
    assert truncate(name, 100) == shown
    assert single_line(f"cannot decode: {name}") == f"cannot decode: {shown[:-2]}"


def _record(message: str) -> logging.LogRecord:
    record = logging.LogRecord("cvt_label", logging.INFO, "", 0, message, (), None)
    record.message = message
    return record
