"""What the network services share: buckets with keys, and incomplete answers."""

import http.client

import urllib3.exceptions

from pipeline.storage.objects import BucketNotFound, ObjectNotFound
from pipeline.text import without_credentials

#: How a connection fails, below every client library; those of `requests` are OSErrors.
CONNECTION_ERRORS = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)


def split(uri: str) -> tuple[str, str]:
    """`s3://bucket/some/key` -> `bucket`, `some/key`."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def whole(data: bytes, count: int) -> bytes:
    """Returns the body of an answer if it has `count` bytes; fewer are a connection failure."""
    if len(data) < count:
        raise http.client.IncompleteRead(data, count - len(data))
    return data


def described(error: BaseException) -> str:
    """Describes an exception by its class and message."""
    message = without_credentials(str(error))
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def no_bucket(uri: str) -> BucketNotFound:  # noqa: D103
    return BucketNotFound(uri, f"bucket {split(uri)[0]!r} does not exist")


def no_object(uri: str) -> ObjectNotFound:  # noqa: D103
    return ObjectNotFound(uri, "no such object")
