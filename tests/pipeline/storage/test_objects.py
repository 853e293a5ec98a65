"""Errors of parsers and libraries as `StorageError`, and packages that are not installed."""

import json

import pytest

from pipeline.storage import (
    ObjectNotFound,
    StorageError,
    content_errors,
    is_under,
    library_errors,
    require_package,
)

#: How deltalake reports an error of its engine: colors, and a stack trace of Rust.
RUST = "\x1b[31mInvalid JSON\x1b[0m\n in log record\n\n   0: std::backtrace::Backtrace::create\n   1: main\n"


def test_parsing_error_names_the_object_and_the_expected_content() -> None:
    with (
        pytest.raises(
            StorageError, match=r"^s3://b/x: not a list of shards: JSONDecodeError: Expecting"
        ) as e,
        content_errors("s3://b/x", "a list of shards"),
    ):
        json.loads("[1,\n")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("error", [ObjectNotFound("s3://b/y", "no such object"), KeyboardInterrupt()])
def test_errors_of_storage_and_interrupts_pass_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, library_errors("delta:x", "cannot be read"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no such table", "no such table"),
        (RUST, "Invalid JSON in log record"),
        ("<Error><Code>NoSuchKey</Code>\n<Key>a</Key></Error>", "NoSuchKey a"),
        ("a  b\n\tc", "a b c"),
        ("x" * 500, "x" * 300),
        ("", ""),
    ],
)
def test_error_of_a_library_is_one_short_line(text: str, expected: str) -> None:
    with pytest.raises(StorageError) as raised, library_errors("delta:x", "cannot be read"):
        raise OSError(text)
    assert str(raised.value) == f"delta:x: cannot be read: OSError: {expected}"
    assert isinstance(raised.value.__cause__, OSError)


@pytest.mark.parametrize("before", [0, 270, 280, 290, 299])
def test_error_of_a_library_has_no_secrets(before: int) -> None:
    """Also none that the end of a long message cuts."""
    text = f"{'x' * before} postgresql://me:planted-password@host/db"
    with pytest.raises(StorageError) as raised, library_errors("iceberg:x", "cannot be used"):
        raise OSError(text)
    assert "pla" not in str(raised.value)


def test_missing_package_is_named_with_the_command_that_installs_it() -> None:
    require_package("json", "delta", "delta:x")
    cause = r"requires the package not_a_package: pip install 'cvt-label\[delta\]'"
    with pytest.raises(StorageError, match=rf"^delta:x: {cause}$"):
        require_package("not_a_package", "delta", "delta:x")


@pytest.mark.parametrize(
    ("uri", "root", "expected"),
    [("/a/b", "/a", True), ("/a", "/a", True), ("/ab", "/a", False), ("/a", "/", True), ("/", "/", True)],
)
def test_folder_contains_itself_and_what_is_under_it(uri: str, root: str, expected: bool) -> None:
    assert is_under(uri, root) == expected
