"""Objects as listed and named, and the errors of storage."""

from dataclasses import dataclass

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


def split(uri: str) -> tuple[str, str]:
    """`s3://bucket/some/key` -> `bucket`, `some/key`."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def no_bucket(uri: str) -> StorageError:  # noqa: D103
    return StorageError(uri, f"bucket {split(uri)[0]!r} does not exist")


def no_object(uri: str) -> ObjectNotFound:  # noqa: D103
    return ObjectNotFound(uri, "no such object")
