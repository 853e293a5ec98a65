"""Prediction files back into manifest rows: after a run that died, and to make the manifest anew."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pipeline.committing import labelled_row
from pipeline.manifest import ManifestRow
from pipeline.planning import Known
from pipeline.predictions import read_footer
from pipeline.shards import Shard, lies_in
from pipeline.storage import ObjectChanged, ObjectInfo, ObjectNotFound, Storage, StorageError

_READERS = 32
_AT_ONCE = 1000


def prediction_files(storage: Storage, partition: str) -> Iterator[ObjectInfo]:
    """The prediction files of a partition."""
    try:
        for info in storage.list(f"{partition}/predictions"):
            if info.uri.endswith(".parquet"):
                yield info
    except ObjectNotFound:  # a local folder that isn't there yet
        return


def reconcile(
    files: Iterable[ObjectInfo], known: Mapping[str, Known], partition: str
) -> tuple[list[ObjectInfo], list[str]]:
    """Compares the prediction files with the manifest.

    Returns:
        the files that the manifest doesn't know in this version, and the shards whose files are not there.
    """
    labelled = {row.output: (uri, row.output_version) for uri, row in known.items() if row.output}
    unlisted = []
    for info in files:
        _, version = labelled.pop(info.uri.removeprefix(f"{partition}/"), (None, None))
        if version != info.version:
            unlisted.append(info)
    return unlisted, [uri for uri, _ in labelled.values()]


def recovered_rows(
    storage: Storage, partition: str, fingerprint: str, files: Iterable[ObjectInfo]
) -> Iterator[ManifestRow]:
    """The manifest rows of prediction files, from their footers.

    Raises:
        StorageError: one of them is no prediction file of this partition.
    """

    def recover(info: ObjectInfo) -> ManifestRow | None:
        try:
            with storage.open(info.uri, info.version) as file:
                footer = read_footer(info.uri, file)
        except (ObjectChanged, ObjectNotFound):  # by another run, which sees to its row
            return None
        if footer.fingerprint != fingerprint:
            raise StorageError(info.uri, f"is of another model or options: {footer.fingerprint}")
        return labelled_row(footer, info.uri.removeprefix(f"{partition}/"), info.version)

    with ThreadPoolExecutor(_READERS, thread_name_prefix="footer") as pool:
        waiting: list[ObjectInfo] = []
        for info in files:
            waiting.append(info)
            if len(waiting) == _AT_ONCE:
                yield from filter(None, pool.map(recover, waiting))
                waiting = []
        yield from filter(None, pool.map(recover, waiting))


def rebuilt_rows(
    storage: Storage, partition: str, fingerprint: str, listing: Iterable[Shard], below: str
) -> list[ManifestRow]:
    """All manifest rows anew, sorted by URI: from prediction files, and failures from the records of runs.

    Args:
        storage: access to the partition.
        partition: its URI.
        fingerprint: its fingerprint.
        listing: the shards of the input.
        below: URI of the input: labelled shards that are there, but not in the listing, are gone.
    """
    files = prediction_files(storage, partition)
    rows = {row.uri: row for row in recovered_rows(storage, partition, fingerprint, files)}
    versions = {shard.uri: shard.version for shard in listing}
    for uri, row in rows.items():
        if uri not in versions and lies_in(uri, below):
            rows[uri] = replace(row, gone=True)
    for uri, failure in recorded_failures(storage, partition).items():
        if uri not in rows:
            if uri in versions:
                rows[uri] = failure
        elif rows[uri].version != failure.failed_version == versions.get(uri):
            rows[uri] = replace(rows[uri], error=failure.error, failed_version=failure.failed_version)
    return [rows[uri] for uri in sorted(rows)]


def recorded_failures(storage: Storage, partition: str) -> dict[str, ManifestRow]:
    """What the records of runs say of shards that couldn't be read, the last word on each."""
    failures: dict[str, ManifestRow] = {}
    try:
        records = sorted(info.uri for info in storage.list(f"{partition}/runs"))
    except ObjectNotFound:
        return failures
    for uri in records:
        try:
            record = json.loads(storage.read(uri))
            for failure in record.get("unreadable", []):
                failures[failure["uri"]] = ManifestRow(**failure, run=record["run"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StorageError(uri, f"not the record of a run: {error}") from None
    return failures
