"""Manifest rows from prediction files and run records: after a crash, and to rebuild the manifest.

Prediction files determine which shards are labeled. Run records hold unreadable and deleted shards.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial

from pipeline.commit.manifest import ManifestRow
from pipeline.commit.partition import Partition
from pipeline.commit.record import MAX_RECORD_BYTES
from pipeline.predictions import Footer, read_footer
from pipeline.storage import (
    ObjectChanged,
    ObjectInfo,
    ObjectNotFound,
    StorageError,
    content_errors,
    map_in_threads,
)


def reconcile(
    files: Iterable[ObjectInfo], manifest: Mapping[str, ManifestRow], partition: str
) -> tuple[list[ObjectInfo], list[str]]:
    """Returns files that the manifest does not have in this version, and shards whose files are missing."""
    labeled = {row.output: (uri, row.output_version) for uri, row in manifest.items() if row.output}
    unlisted = []
    for info in files:
        _, version = labeled.pop(info.uri.removeprefix(f"{partition}/"), (None, None))
        if version != info.version:
            unlisted.append(info)
    return unlisted, [uri for uri, _ in labeled.values()]


def recovered_rows(
    partition: Partition, files: Iterable[ObjectInfo], fingerprint: str | None = None
) -> Iterator[ManifestRow]:
    """Yields the manifest rows of prediction files, from the files' footers; raises `StorageError`.

    All files must have the given fingerprint; if it is None, the fingerprint of the first file.
    """

    def read(info: ObjectInfo) -> tuple[ObjectInfo, Footer] | None:
        try:
            with partition.storage.open(info.uri, info.version) as file:
                return info, read_footer(info.uri, file)
        except (ObjectChanged, ObjectNotFound):  # another run replaced the file, and writes its row
            return None

    for info, footer in filter(None, map_in_threads(read, files)):
        if (fingerprint := fingerprint or footer.fingerprint) != footer.fingerprint:
            cause = (
                f"the fingerprint {footer.fingerprint} is not the partition's ({fingerprint}): "
                "the file has labels of another model or of other options"
            )
            raise StorageError(info.uri, cause)
        yield ManifestRow.of_file(footer, info.uri.removeprefix(f"{partition.uri}/"), info.version)


def read_history(partition: Partition) -> tuple[dict[str, ManifestRow], set[str]]:
    """Replays the records of all runs; raises `StorageError` if an object is not a run record.

    Returns manifest rows of shards that could not be read, by URI, and shards that were deleted.
    """
    failures, deleted = dict[str, ManifestRow](), set[str]()
    storage = partition.storage
    uris = sorted(info.uri for info in storage.list(f"{partition.uri}/runs"))
    contents = map_in_threads(partial(storage.read, max_bytes=MAX_RECORD_BYTES), uris)
    for uri, content in zip(uris, contents, strict=True):
        with content_errors(uri, "a run record"):
            record = json.loads(content)
            deleted -= {*record["removed"], *record["reappeared"]}
            deleted |= {*record["deleted"]}
            for shard in (*record["removed"], *record["recovered"]):
                failures.pop(shard, None)
            for failure in record["unreadable"]:
                failures[failure["uri"]] = ManifestRow(**failure, run=record["run"])
    return failures, deleted


def _with_history(
    labeled: Mapping[str, ManifestRow], failures: Mapping[str, ManifestRow], deleted: set[str]
) -> dict[str, ManifestRow]:
    """Returns all rows by URI, given the rows of prediction files."""
    rows = {**labeled}
    for uri, failure in failures.items():
        rows[uri] = failure.merged_with(rows.get(uri))
    for uri in deleted & rows.keys():
        rows[uri] = replace(rows[uri], deleted=True)
    return rows


@dataclass(frozen=True)
class Repairs:
    """The rows of the manifest, as stored, and in line with prediction files and run records.

    Attributes:
        stored: the stored rows by URI, with failures that only run records have.
        entries: the correct rows by URI.
        found: shards whose rows are from prediction files that the manifest does not have in this version.
    """

    stored: Mapping[str, ManifestRow]
    entries: Mapping[str, ManifestRow]
    found: Set[str]


def find_repairs(
    partition: Partition, fingerprint: str, manifest: Mapping[str, ManifestRow], clean_shutdown: bool
) -> Repairs:
    """Compares the manifest with prediction files and run records; raises `StorageError` if one is invalid.

    Prediction files are the source of truth, so they are always listed. Run records are read only if the
    manifest is missing or the last run did not shut down cleanly (`clean_shutdown` is False).
    """
    unlisted, lost = reconcile(partition.prediction_files(), manifest, partition.uri)
    found = {row.uri: row for row in recovered_rows(partition, unlisted, fingerprint)}
    removed = {*lost} - found.keys()
    entries = {uri: row for uri, row in manifest.items() if uri not in removed} | found
    if clean_shutdown:
        return Repairs(manifest, entries, found.keys())
    failures, deleted = read_history(partition)
    # A file that the manifest does not have is newer than all failures. Without a manifest, no file is newer.
    newer = {*found} if manifest else set[str]()
    stored = {**manifest} | {uri: failures[uri] for uri in newer & failures.keys()}
    for uri in newer | removed:
        failures.pop(uri, None)
    labeled = {
        uri: row.with_state(ManifestRow(uri).state) for uri, row in entries.items() if row.output is not None
    }
    return Repairs(stored, _with_history(labeled, failures, deleted), found.keys())


def rebuilt_rows(partition: Partition) -> list[ManifestRow]:
    """Regenerates all manifest rows, sorted by URI. Raises the same errors as `find_repairs`."""
    labeled = {row.uri: row for row in recovered_rows(partition, partition.prediction_files())}
    rows = _with_history(labeled, *read_history(partition))
    return [rows[uri] for uri in sorted(rows)]
