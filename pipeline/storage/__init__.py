"""Object storage: s3://, gs:// and local files behind five verbs (list, open, stat, write, delete).

The only package that talks to a storage service. Not a file system: objects are written whole, in one
atomic step, and read at a pinned version. What fails in a way that may pass is tried again.
"""

from pipeline.storage.access import Storage, normalised, room_below
from pipeline.storage.objects import (
    ABSENT,
    AccessDenied,
    BucketNotFound,
    ObjectChanged,
    ObjectInfo,
    ObjectNotFound,
    StorageError,
)

__all__ = [
    "ABSENT",
    "AccessDenied",
    "BucketNotFound",
    "ObjectChanged",
    "ObjectInfo",
    "ObjectNotFound",
    "Storage",
    "StorageError",
    "normalised",
    "room_below",
]
