"""Manifest rows from prediction files and run records: after a crash, and to rebuild the manifest.

Prediction files determine which shards are labeled. Run records hold unreadable and deleted shards.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pipeline.commit.manifest import ManifestRow, batched
from pipeline.commit.record import MAX_RECORD_BYTES
from pipeline.predictions import Footer, read_footer
from pipeline.storage import ObjectChanged, ObjectInfo, ObjectNotFound, Storage, StorageError

_READERS = 32
_BATCH_FILES = 1000


def prediction_files(storage: Storage, partition: str) -> Iterator[ObjectInfo]:
    """Lists the prediction files of a partition."""
    files = storage.list(f"{partition}/predictions")
    return (info for info in files if info.uri.endswith(".parquet"))


def reconcile(
    files: Iterable[ObjectInfo], manifest: Mapping[str, ManifestRow], partition: str
) -> tuple[list[ObjectInfo], list[str]]:
    """Compares the prediction files with the manifest.

    Returns:
        The files that the manifest does not have in this version, and the shards whose files are missing.
    """
    labeled = {row.output: (uri, row.output_version) for uri, row in manifest.items() if row.output}
    unlisted = []
    for info in files:
        _, version = labeled.pop(info.uri.removeprefix(f"{partition}/"), (None, None))
        if version != info.version:
            unlisted.append(info)
    return unlisted, [uri for uri, _ in labeled.values()]


def recovered_rows(
    storage: Storage, partition: str, files: Iterable[ObjectInfo], fingerprint: str | None = None
) -> Iterator[ManifestRow]:
    """Yields the manifest rows of prediction files, from the files' footers; raises `StorageError`.

    All files must have the given fingerprint; if it is None, the fingerprint of the first file.
    """

    def read(info: ObjectInfo) -> tuple[ObjectInfo, Footer] | None:
        try:
            with storage.open(info.uri, info.version) as file:
                return info, read_footer(info.uri, file)
        except (ObjectChanged, ObjectNotFound):  # another run replaced the file, and writes its row
            return None

    with ThreadPoolExecutor(_READERS, thread_name_prefix="footer") as pool:
        for batch in batched(files, _BATCH_FILES):
            for info, footer in filter(None, pool.map(read, batch)):
                fingerprint = fingerprint or footer.fingerprint
                if footer.fingerprint != fingerprint:
                    cause = (
                        f"the fingerprint {footer.fingerprint} is not the partition's ({fingerprint}): "
                        "the file has labels of another model or of other options"
                    )
                    raise StorageError(info.uri, cause)
                yield ManifestRow.of_file(footer, info.uri.removeprefix(f"{partition}/"), info.version)


@dataclass
class History:
    """State that only run records hold.

    Attributes:
        failures: manifest rows of shards that the last attempt could not read, by URI.
        deleted: shards that were deleted from the input.
    """

    failures: dict[str, ManifestRow] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)

    def replay(self, record: Mapping[str, Any]) -> None:
        """Applies the record of a run; records are replayed in the order of their runs."""
        self.deleted -= {*record["removed"], *record["reappeared"]}
        self.deleted |= {*record["deleted"]}
        for uri in (*record["removed"], *record["recovered"]):
            self.failures.pop(uri, None)
        for failure in record["unreadable"]:
            self.failures[failure["uri"]] = ManifestRow(**failure, run=record["run"])

    def apply_to(self, labeled: Mapping[str, ManifestRow]) -> dict[str, ManifestRow]:
        """Returns all rows by URI, given the rows of prediction files."""
        rows = {**labeled}
        for uri, failure in self.failures.items():
            rows[uri] = failure.merged_with(rows.get(uri))
        for uri in self.deleted & rows.keys():
            rows[uri] = replace(rows[uri], deleted=True)
        return rows


def read_history(storage: Storage, partition: str) -> History:
    """Replays the records of all runs; raises `StorageError` if an object is not a run record."""
    history = History()
    uris = sorted(info.uri for info in storage.list(f"{partition}/runs"))
    with ThreadPoolExecutor(_READERS, thread_name_prefix="record") as pool:
        contents = pool.map(partial(storage.read, max_bytes=MAX_RECORD_BYTES), uris)
        for uri, content in zip(uris, contents, strict=True):
            try:
                history.replay(json.loads(content))
            except (ValueError, TypeError, KeyError) as error:
                raise StorageError(uri, f"not a run record: {error!r}") from None
    return history


@dataclass
class Repairs:
    """Changes that bring the manifest in line with prediction files and run records.

    Attributes:
        rows: rows to insert or replace, by URI.
        removed: shards whose rows are removed.
        entries: all rows after the repairs, by URI.
        recovered: shards whose recorded failure no longer applies.
        deleted: corrected values of the field `deleted`, by URI.
    """

    rows: dict[str, ManifestRow]
    removed: set[str]
    entries: dict[str, ManifestRow]
    recovered: set[str]
    deleted: dict[str, bool] = field(default_factory=dict)


def find_repairs(
    storage: Storage,
    partition: str,
    fingerprint: str,
    manifest: Mapping[str, ManifestRow],
    clean_shutdown: bool,
) -> Repairs:
    """Compares the manifest with prediction files and run records; raises `StorageError` if one is invalid.

    Prediction files are the source of truth, so they are always listed. Run records are read only if the
    manifest is missing or the last run did not shut down cleanly (`clean_shutdown` is False).
    """
    unlisted, lost = reconcile(prediction_files(storage, partition), manifest, partition)
    found = {row.uri: row for row in recovered_rows(storage, partition, unlisted, fingerprint)}
    removed = set(lost) - found.keys()
    before = {uri: row for uri, row in manifest.items() if uri not in removed} | found
    # A file that the manifest does not have is newer than all rows. Without a manifest, no file is newer.
    newer = {uri for uri in found if manifest}
    recovered = {uri for uri in newer & manifest.keys() if manifest[uri].error is not None}
    repairs = Repairs(dict(found), removed, before, recovered)
    if clean_shutdown:
        return repairs
    history = read_history(storage, partition)
    repairs.recovered |= newer & history.failures.keys()
    for uri in newer | removed:
        history.failures.pop(uri, None)
    labeled = {
        uri: replace(row, error=None, failed_version=None, deleted=False)
        for uri, row in before.items()
        if row.output is not None
    }
    repairs.entries = history.apply_to(labeled)
    repairs.removed |= before.keys() - repairs.entries.keys()
    for uri, row in repairs.entries.items():
        old = before.get(uri, ManifestRow(uri))
        if row.deleted != old.deleted:
            repairs.deleted[uri] = row.deleted
        if row.error is None and old.error is not None:
            repairs.recovered.add(uri)
        elif (row.error, row.failed_version) != (old.error, old.failed_version):
            repairs.rows[uri] = history.failures[uri].merged_with(found.get(uri))
    return repairs


def rebuilt_rows(storage: Storage, partition: str) -> list[ManifestRow]:
    """Regenerates all manifest rows, sorted by URI. Raises the same errors as `find_repairs`."""
    files = prediction_files(storage, partition)
    labeled = {row.uri: row for row in recovered_rows(storage, partition, files)}
    rows = read_history(storage, partition).apply_to(labeled)
    return [rows[uri] for uri in sorted(rows)]
