"""Manifest rows from prediction files and run records: after a crash, and to rebuild the manifest.

Prediction files hold what is labeled. Each run records the rest (shards that couldn't be read or were deleted
from the input) before it writes the manifest. Recovery replays the records in their order.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.commit.manifest import ManifestRow, batched
from pipeline.predictions import Footer, read_footer
from pipeline.storage import ObjectChanged, ObjectInfo, ObjectNotFound, Storage, StorageError

_READERS = 32
_AT_ONCE = 1000


def prediction_files(storage: Storage, partition: str) -> Iterator[ObjectInfo]:
    """Lists the prediction files of a partition."""
    files = storage.list(f"{partition}/predictions")
    return (info for info in files if info.uri.endswith(".parquet"))


def reconcile(
    files: Iterable[ObjectInfo], known: Mapping[str, ManifestRow], partition: str
) -> tuple[list[ObjectInfo], list[str]]:
    """Returns files that the manifest doesn't have in this version, and shards whose files are missing."""
    labelled = {row.output: (uri, row.output_version) for uri, row in known.items() if row.output}
    unlisted = []
    for info in files:
        _, version = labelled.pop(info.uri.removeprefix(f"{partition}/"), (None, None))
        if version != info.version:
            unlisted.append(info)
    return unlisted, [uri for uri, _ in labelled.values()]


def recovered_rows(
    storage: Storage, partition: str, files: Iterable[ObjectInfo], fingerprint: str | None = None
) -> Iterator[ManifestRow]:
    """Yields the manifest rows of prediction files, from their footers; raises `StorageError`.

    All must have one fingerprint: the given one, or that of the first file.
    """

    def read(info: ObjectInfo) -> tuple[ObjectInfo, Footer] | None:
        try:
            with storage.open(info.uri, info.version) as file:
                return info, read_footer(info.uri, file)
        except (ObjectChanged, ObjectNotFound):  # another run replaced it, and writes its row
            return None

    with ThreadPoolExecutor(_READERS, thread_name_prefix="footer") as pool:
        for batch in batched(files, _AT_ONCE):
            for info, footer in filter(None, pool.map(read, batch)):
                fingerprint = fingerprint or footer.fingerprint
                if footer.fingerprint != fingerprint:
                    raise StorageError(info.uri, f"is of another model or options: {footer.fingerprint}")
                yield ManifestRow.of_file(footer, info.uri.removeprefix(f"{partition}/"), info.version)


@dataclass
class History:
    """What only run records hold: shards that couldn't be read last time, and that the input has lost."""

    failures: dict[str, ManifestRow] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)

    def replay(self, record: Mapping[str, Any]) -> None:
        """Adds what a run has recorded, after all earlier runs."""
        self.deleted -= {*record["removed"], *record["reappeared"]}
        self.deleted |= {*record["deleted"]}
        for uri in (*record["removed"], *record["recovered"]):
            self.failures.pop(uri, None)
        for failure in record["unreadable"]:
            self.failures[failure["uri"]] = ManifestRow(**failure, run=record["run"])

    def applied(self, labeled: Mapping[str, ManifestRow]) -> dict[str, ManifestRow]:
        """All rows by URI, from those of prediction files."""
        rows = {**labeled}
        for uri, failure in self.failures.items():
            rows[uri] = failure.succeeding(rows.get(uri))
        for uri in self.deleted & rows.keys():
            rows[uri] = replace(rows[uri], deleted=True)
        return rows


def read_history(storage: Storage, partition: str) -> History:
    """Replays the records of all runs; raises `StorageError` if one of them is no record."""
    history = History()
    uris = sorted(info.uri for info in storage.list(f"{partition}/runs"))
    with ThreadPoolExecutor(_READERS, thread_name_prefix="record") as pool:
        for uri, content in zip(uris, pool.map(storage.read, uris), strict=True):
            try:
                history.replay(json.loads(content))
            except (ValueError, TypeError, KeyError) as error:
                raise StorageError(uri, f"not the record of a run: {error!r}") from None
    return history


@dataclass
class Repairs:
    """How to bring the manifest in line with prediction files and records; rows are by URI.

    Attributes:
        rows, removed: rows to put in, and shards whose rows are to be removed.
        entries: all rows, with these repairs.
        recovered: shards whose failures no longer hold.
        deleted: whether the shard was deleted from the input, where the manifest has it otherwise.
    """

    rows: dict[str, ManifestRow]
    removed: set[str]
    entries: dict[str, ManifestRow]
    recovered: set[str]
    deleted: dict[str, bool] = field(default_factory=dict)


def find_repairs(
    storage: Storage, partition: str, fingerprint: str, manifest: Mapping[str, ManifestRow], in_order: bool
) -> Repairs:
    """Compares the manifest, whose rows it gets by URI, with what it is made from.

    Prediction files are always listed, for they are the source of truth, whoever wrote them. Run records are
    only read unless all is `in_order`: there is a manifest, and the last run left it up to date.

    Raises:
        StorageError: something there is no prediction file of this partition, or no record.
    """
    unlisted, lost = reconcile(prediction_files(storage, partition), manifest, partition)
    found = {row.uri: row for row in recovered_rows(storage, partition, unlisted, fingerprint)}
    removed = set(lost) - found.keys()
    before = {uri: row for uri, row in manifest.items() if uri not in removed} | found
    # A file that the manifest doesn't have is newer than all its rows; without a manifest, none is.
    newer = {uri for uri in found if manifest}
    recovered = {uri for uri in newer & manifest.keys() if manifest[uri].error is not None}
    repairs = Repairs(dict(found), removed, before, recovered)
    if in_order:
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
    repairs.entries = history.applied(labeled)
    repairs.removed |= before.keys() - repairs.entries.keys()
    for uri, row in repairs.entries.items():
        old = before.get(uri, ManifestRow(uri))
        if row.deleted != old.deleted:
            repairs.deleted[uri] = row.deleted
        if row.error is None and old.error is not None:
            repairs.recovered.add(uri)
        elif (row.error, row.failed_version) != (old.error, old.failed_version):
            repairs.rows[uri] = history.failures[uri].succeeding(found.get(uri))
    return repairs


def rebuilt_rows(storage: Storage, partition: str) -> list[ManifestRow]:
    """Regenerates all manifest rows, sorted by URI; raises as `find_repairs`."""
    files = prediction_files(storage, partition)
    labeled = {row.uri: row for row in recovered_rows(storage, partition, files)}
    rows = read_history(storage, partition).applied(labeled)
    return [rows[uri] for uri in sorted(rows)]
