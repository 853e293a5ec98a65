"""Objects as listed, the spelling of their URIs, and the errors of storage."""

import os
from dataclasses import dataclass
from urllib.parse import unquote

_MAX_KEY_BYTES = 1024  # on S3 and on Google Cloud Storage
_MAX_LOCAL_PATH_BYTES = 4095  # PATH_MAX, without the NUL at its end
_TEMPORARY_NAME_BYTES = 37  # of the name that a local file has while it is written
_MAX_LOCAL_NAME_BYTES = 255

#: Stands for the version of an object that does not exist.
ABSENT = "absent"

#: The causes of an `ObjectChanged`: in a read, and in a write or a deletion.
NOT_AS_LISTED = "the object is no longer the version that was listed"
NOT_AS_EXPECTED = "the object is not the version that was expected"


class StorageError(Exception):
    """A permanent failure, after retries, with the URI of the object, folder or bucket."""

    def __init__(self, uri: str, cause: str) -> None:
        super().__init__(uri, cause)
        self.uri = uri
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.uri}: {self.cause}"


class ObjectNotFound(StorageError):  # noqa: N818 - reads as what happened
    """There is no such object or folder."""


class ObjectChanged(StorageError):  # noqa: N818
    """The object is no longer the version that was asked for."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as listed.

    Attributes:
        uri: `s3://bucket/key`, `gs://bucket/name`, or an absolute local path.
        size: in bytes.
        version: changes whenever the content does: `<etag>-<size>` on S3, `<generation>-<size>` on
            Google Cloud Storage, `<modification time in ns>-<size>` for a local file.
    """

    uri: str
    size: int
    version: str


def normalize_uri(uri: str) -> str:
    """Returns the one spelling of a place: no trailing slash; local paths absolute, without `file://`.

    Raises `StorageError` if the URI names no place, or holds credentials.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        path = unquote(rest) if separator else uri
        if not path or (separator and not path.startswith("/")):
            raise StorageError(uri, "is not an absolute path" if separator else "is not a path")
        return "/" + os.path.abspath(path).lstrip("/")  # noqa: PTH100 - Path keeps '..'
    if not rest.strip("/"):
        raise StorageError(uri, "names no bucket")
    if "@" in rest.partition("/")[0]:
        raise StorageError(f"{scheme}://...", "credentials don't belong into a URI, but in the environment")
    return uri.rstrip("/")


def is_relative(uri: str) -> bool:
    """Whether a path or URI names another place in another working directory."""
    return "://" not in uri and not uri.startswith("/")


def max_name_bytes(uri: str) -> int:
    """Returns the maximum bytes of a name under a normalized folder; 0 if the folder's own is too long."""
    if "://" in uri:
        return _MAX_KEY_BYTES - len(f"{uri.partition('://')[2].partition('/')[2]}/".encode())
    path = os.fsencode(uri)
    if any(len(part) > _MAX_LOCAL_NAME_BYTES for part in path.split(b"/")):
        return 0
    return _MAX_LOCAL_PATH_BYTES - _TEMPORARY_NAME_BYTES - len(path) - 1


def is_under(uri: str, root: str) -> bool:
    """Whether a URI is the root itself, or under it; both are normalized."""
    return uri == root or uri.startswith(f"{root}/")


def relative_name(folder: str, uri: str) -> str:
    """Returns an object's name relative to the folder; its last part if it is the `folder` itself."""
    return uri[len(folder) :].lstrip("/") or uri.rpartition("/")[2]


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/some/key` -> `bucket`, `some/key`."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def bucket_not_found(uri: str) -> StorageError:  # noqa: D103
    return StorageError(uri, f"bucket {split_uri(uri)[0]!r} does not exist")


def object_not_found(uri: str) -> ObjectNotFound:  # noqa: D103
    return ObjectNotFound(uri, "no such object")
