"""The spelling of URIs."""

import os
from urllib.parse import unquote

from pipeline.storage.objects import StorageError


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


def lies_in(uri: str, root: str) -> bool:
    """Whether a URI is the root itself, or under it; both are normalized."""
    return uri == root or uri.startswith(f"{root}/")


def name_below(folder: str, uri: str) -> str:
    """Returns an object's name relative to the folder; its last part if it is the `folder` itself."""
    return uri[len(folder) :].lstrip("/") or uri.rpartition("/")[2]
