"""Object storage: S3, Google Cloud Storage and local files; ranged reads, conditional writes, retries.

Only this package accesses a storage service. Each object is written whole, in one atomic step, and is read
at a pinned version.
"""

from pipeline.storage.access import Storage, Versioned
from pipeline.storage.objects import (
    ABSENT,
    AccessDenied,
    BucketNotFound,
    ObjectChanged,
    ObjectInfo,
    ObjectNotFound,
    ObjectTooLarge,
    StorageError,
    content_errors,
    is_relative,
    is_under,
    library_errors,
    normalize_uri,
    relative_name,
    require_package,
)
from pipeline.storage.parquet import encode_parquet, read_batches, read_row_groups, read_table
from pipeline.storage.retrying import pause_after, retry_counts
from pipeline.storage.temporary import temporary_folder
from pipeline.storage.threads import consume_in_thread, map_in_threads
