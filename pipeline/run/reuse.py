"""Finds the stored rows of unchanged images in changed shards: a run copies them and labels the others."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from pipeline.commit import CopiedRows, ManifestRow, Partition
from pipeline.predictions import ErrorCategory
from pipeline.read import ReadOptions, Shard, complete_sample, list_samples
from pipeline.storage import ABSENT, ObjectChanged, ObjectNotFound, read_table

_THREADS = 16
#: Errors of a row and not of its image, which a run finds again.
_ROW_ERRORS = (ErrorCategory.INVALID_KEY, ErrorCategory.INVALID_CARRIED_VALUE)


class _StoredRow(NamedTuple):
    """A row of a prediction file, and the version of its image."""

    file: tuple[str, str]  # URI and version
    row: int
    version: str | None
    is_error: bool


def find_copied_rows(
    partition: Partition,
    shards: Iterable[Shard],
    entries: Mapping[str, ManifestRow],
    losing: Iterable[ManifestRow],
    options: ReadOptions,
    with_errors: bool,
) -> dict[str, CopiedRows]:
    """Returns the rows that each shard of image files or of a table can copy, by URI of the shard.

    An image is unchanged if its URI and version are those of a stored row. A version that the input does not
    give, such as that of an image on a web server, is not compared.

    Args:
        partition: the stored labels.
        shards: the shards to label.
        entries: manifest rows by URI.
        losing: manifest rows of other shards that may have lost images to these.
        options: how the readers find keys.
        with_errors: whether error rows are copied too; otherwise the images are read again.
    """
    losing = [*losing]
    shards = [s for s in shards if (s.members or s.rows) and (losing or s.uri in entries)]
    if not shards:
        return {}

    def find(shard: Shard) -> CopiedRows:
        row = entries.get(shard.uri)
        own = {} if row is None else _stored_rows(partition, row)
        samples = list_samples(shard, options)
        copied = CopiedRows(len(samples))
        for position, sample in enumerate(samples):
            stored = own.get(sample.uri) or moved.get(sample.uri)
            if stored is None or (stored.is_error and not with_errors):
                continue
            is_absent = sample.version == ABSENT and stored.is_error
            if not is_absent and sample.version not in (None, stored.version):
                continue
            if complete_sample(sample, options).error is not None:  # the row is an error now
                continue
            copied.rows.setdefault(stored.file, []).append((position, stored.row))
            copied.errors += stored.is_error
        return copied

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="copy") as pool:
        rows = pool.map(partial(_stored_rows, partition), losing)
        moved = dict(item for found in rows for item in found.items())
        found = zip(shards, pool.map(find, shards), strict=True)
        return {shard.uri: copied for shard, copied in found if copied.rows}


def _stored_rows(partition: Partition, row: ManifestRow) -> dict[str | None, _StoredRow]:
    """Returns the rows of a shard's prediction file by URI of the image; none if there is no such file."""
    if row.output is None or row.output_version is None:
        return {}
    file = f"{partition.uri}/{row.output}", row.output_version
    try:
        with partition.storage.open(*file) as stream:
            table = read_table(stream, ["uri", "version", "error"])
    except (ObjectChanged, ObjectNotFound):  # an overlapping run replaced the file
        return {}
    columns = zip(*(table[name].to_pylist() for name in ("uri", "version", "error")), strict=True)
    # Of several rows with one URI, one without an error comes last and stays.
    rows = sorted(enumerate(columns), key=lambda row: row[1][2] is None)
    return {
        uri: _StoredRow(file, number, version, error is not None)
        for number, (uri, version, error) in rows
        if uri is not None and (error is None or error.partition(":")[0] not in _ROW_ERRORS)
    }
