"""Object storage: S3, Google Cloud Storage and local files; ranged reads, conditional writes, retries.

The only package that accesses a storage service. It is no file system: objects are written whole, in one
atomic step, and read at a pinned version.
"""

from pipeline.storage.access import Storage, Versioned
from pipeline.storage.objects import (
    ABSENT,
    ObjectChanged,
    ObjectInfo,
    ObjectNotFound,
    StorageError,
    is_relative,
    is_under,
    max_name_bytes,
    normalize_uri,
    relative_name,
)
from pipeline.storage.retrying import retry_counts
