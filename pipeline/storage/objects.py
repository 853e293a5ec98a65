"""Object metadata, normalization of URIs, and storage errors."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self
from urllib.parse import unquote

from pipeline.text import remove_secrets

#: `s3:bucket`, `s3:/bucket`, `s3//bucket`, `s3;//bucket` and `ssh:key@bucket`, but not `s3://bucket`.
_MISTYPED = re.compile(
    r"((?:s3[an]?|gs|gcs|https?):|[a-z][a-z0-9+.-]*:(?=/|[^/]*@))(?!//)"
    r"|(?:s3[an]?|gs|gcs|https?)(?:[^\w:]?//|/:/)",
    re.I,
)
_SIGNATURE = re.compile(r"[?&]X-(Amz|Goog)-(Signature|Credential|Security-Token)=", re.I)
_LOCATIONS = "s3://, gs://, file:// or a local path"

#: The version of an object that does not exist.
ABSENT = "absent"


class StorageError(Exception):
    """An operation on an object, folder or bucket failed permanently; transient failures were retried."""

    def __init__(self, uri: str, cause: str) -> None:
        super().__init__(uri, cause)
        self.uri = uri
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.uri}: {self.cause}"


class ObjectNotFound(StorageError):  # noqa: N818 - reads as what happened
    """The object or folder does not exist."""


class BucketNotFound(StorageError):  # noqa: N818
    """The bucket does not exist."""


class AccessDenied(StorageError):  # noqa: N818
    """The service denies access to the object, folder or bucket."""


class ObjectTooLarge(StorageError):  # noqa: N818
    """The object has more bytes than the caller accepts."""


class ObjectChanged(StorageError):  # noqa: N818
    """The object does not have the expected version."""

    def __init__(self, uri: str, cause: str = "the object is no longer the expected version") -> None:
        super().__init__(uri, cause)


@contextlib.contextmanager
def content_errors(uri: str, expected: str) -> Iterator[None]:
    """Raises errors of a block that parses an object as a `StorageError`: the object is not `expected`."""
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:  # the classes of Arrow, pydantic and json, too
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise StorageError(uri, f"not {expected}: {cause}") from None


@contextlib.contextmanager
def library_errors(uri: str, action: str) -> Iterator[None]:
    """Raises errors of a block that calls a library as a `StorageError`: `action` failed."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # libraries for tables raise classes of many packages
        text = re.split(r"\n\s*0: ", str(error))[0]  # without the stack trace of Rust
        text = re.sub(r"\x1b\[[0-9;]*m|<[^<>]*>", " ", text)  # without colors, and without XML tags
        text = remove_secrets(" ".join(text.split()))[:300]
        raise StorageError(uri, f"{action}: {type(error).__name__}: {text}") from error


def require_package(package: str, extra: str, uri: str) -> None:
    """Raises `StorageError` if an optional package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise StorageError(uri, f"requires the package {package}: pip install 'cvt-label[{extra}]'")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """Metadata of an object.

    Attributes:
        uri: `s3://bucket/key`, `gs://bucket/name`, or an absolute local path.
        version: Changes whenever the content changes: `<etag>-<size>` on S3, `<generation>-<size>` on
            Google Cloud Storage, `<modification time in ns>-<size>` for a local file.
    """

    uri: str
    size: int
    version: str

    def __post_init__(self) -> None:
        if not 0 <= self.size < 2**63:
            raise ValueError(f"the size {self.size} of {self.uri} is invalid")

    @classmethod
    def of_version(cls, uri: str, version: str) -> Self:
        """Returns the metadata of an object at a version, which ends with the size."""
        return cls(uri, int(version.rpartition("-")[2]), version)


def normalize_uri(uri: str) -> str:
    """Returns the canonical form of a URI, without a trailing slash.

    A local path becomes absolute, without `file://`; also `file:/path` and `file://localhost/path`.

    Raises:
        StorageError: The URI has no bucket, no path or no valid scheme, or contains credentials.
    """
    uri = re.sub("^file:(//localhost)?/(?!/)", "file:///", uri)
    if mistyped := _MISTYPED.match(uri):  # would be a local folder
        raise StorageError(f"{mistyped[0]}...", f"mistyped scheme; write {_LOCATIONS}")
    scheme, separator, rest = uri.partition("://")
    if _SIGNATURE.search(rest) or (scheme in ("s3", "gs") and "@" in rest.partition("/")[0]):
        cause = "the URI contains credentials or a signature; set credentials in the environment"
        raise StorageError(f"{scheme}://...", cause)
    if separator and scheme not in ("s3", "gs", "file"):
        raise unsupported_scheme(scheme)
    if not separator or scheme == "file":
        path = unquote(rest) if separator else uri
        if not path or (separator and not path.startswith("/")):
            raise StorageError(uri, "the path must be absolute" if separator else "the path is empty")
        return "/" + os.path.abspath(path).lstrip("/")  # noqa: PTH100 - Path keeps '..'
    if not rest.strip("/"):
        raise StorageError(uri, "the URI has no bucket")
    return uri.rstrip("/")


def unsupported_scheme(scheme: str) -> StorageError:  # noqa: D103
    # Without the rest of the URI: the query of a signed URL holds the signature.
    return StorageError(f"{scheme}://...", f"{scheme}:// is not supported; use {_LOCATIONS}")


def is_relative(uri: str) -> bool:
    """Returns whether a path or URI depends on the working directory."""
    return not ("://" in uri or uri.startswith("/") or _MISTYPED.match(uri))


def is_under(uri: str, root: str) -> bool:
    """Returns whether a normalized URI equals the normalized `root` or is under `root`."""
    return uri == root or uri.startswith(f"{root.rstrip('/')}/")


def relative_name(folder: str, uri: str) -> str:
    """Returns the name of an object relative to `folder`, or the object's last part if `uri` is `folder`."""
    return uri[len(folder) :].lstrip("/") or uri.rpartition("/")[2]
