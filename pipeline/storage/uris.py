"""Any object by its URI, whichever service holds it."""

from __future__ import annotations

import os
from urllib.parse import unquote

from pipeline.storage.objects import StorageError

# Of a key, on S3 and on Google Cloud Storage; of a local path (PATH_MAX, with the NUL at its end), and of the
# name that a file has in it while it is written.
_MAX_KEY_BYTES = 1024

_MAX_LOCAL_PATH_BYTES = 4095

_TEMPORARY_NAME_BYTES = 37

_MAX_LOCAL_NAME_BYTES = 255


def normalised(uri: str) -> str:
    """One spelling for each place: no trailing slash, and local paths absolute, without file://."""
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


def room_below(uri: str) -> int:
    """Bytes that the names of objects below a folder may have; none or less where the folder's are too many.

    Raises:
        StorageError: it isn't a place.
    """
    uri = normalised(uri)
    if "://" in uri:
        return _MAX_KEY_BYTES - len(f"{uri.partition('://')[2].partition('/')[2]}/".encode())
    path = os.fsencode(uri)
    if any(len(part) > _MAX_LOCAL_NAME_BYTES for part in path.split(b"/")):
        return 0
    return _MAX_LOCAL_PATH_BYTES - _TEMPORARY_NAME_BYTES - len(path) - 1


def lies_in(uri: str, root: str) -> bool:
    """Whether a URI is the root itself, or below it; both as `storage.normalised` makes them."""
    return uri == root or uri.startswith(f"{root}/")


def name_below(folder: str, uri: str) -> str:
    """An object's name relative to the folder; its last part, if it is the `folder` itself."""
    return uri[len(folder) :].lstrip("/") or uri.rpartition("/")[2]
