"""The spelling of URIs, and the length that storage services allow."""

import os
from urllib.parse import unquote

from pipeline.storage.objects import StorageError

_MAX_KEY_BYTES = 1024  # on S3 and on Google Cloud Storage
_MAX_LOCAL_PATH_BYTES = 4095  # PATH_MAX, without the NUL at its end
_TEMPORARY_NAME_BYTES = 37  # of the name that a local file has while it is written
_MAX_LOCAL_NAME_BYTES = 255


def normalize_uri(uri: str) -> str:
    """Returns the one spelling of a place: no trailing slash; local paths absolute, without `file://`.

    Raises:
        StorageError: the URI names no place, or holds credentials.
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


def room_below(uri: str) -> int:
    """Returns the bytes that names under a normalized folder may have: none if its own name is too long."""
    if "://" in uri:
        return _MAX_KEY_BYTES - len(f"{uri.partition('://')[2].partition('/')[2]}/".encode())
    path = os.fsencode(uri)
    if any(len(part) > _MAX_LOCAL_NAME_BYTES for part in path.split(b"/")):
        return 0
    return _MAX_LOCAL_PATH_BYTES - _TEMPORARY_NAME_BYTES - len(path) - 1


def lies_in(uri: str, root: str) -> bool:
    """Whether a URI is the root itself, or under it; both are normalized."""
    return uri == root or uri.startswith(f"{root}/")


def name_below(folder: str, uri: str) -> str:
    """Returns an object's name relative to the folder; its last part if it is the `folder` itself."""
    return uri[len(folder) :].lstrip("/") or uri.rpartition("/")[2]
