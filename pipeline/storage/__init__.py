"""Object storage: s3://, gs:// and local files behind five verbs (list, open, stat, write, delete).

The only package that talks to a storage service. Not a file system: objects are written whole, in one
atomic step, and read at a pinned version. What fails in a way that may pass is tried again.
"""

from pipeline.storage.access import Storage
from pipeline.storage.objects import (
    ABSENT,
    AccessDenied,
    BucketNotFound,
    ObjectChanged,
    ObjectInfo,
    ObjectNotFound,
    StorageError,
)
from pipeline.storage.retrying import Fault, faults, retried
from pipeline.storage.uris import lies_in, name_below, normalised, room_below

__all__ = [
    "ABSENT",
    "AccessDenied",
    "BucketNotFound",
    "Fault",
    "ObjectChanged",
    "ObjectInfo",
    "ObjectNotFound",
    "Storage",
    "StorageError",
    "faults",
    "lies_in",
    "name_below",
    "normalised",
    "retried",
    "room_below",
]
