"""Manifest rows from prediction files, and from the records of runs: after a run that died, and to make the
manifest anew.

Files tell what is labelled. What they can't tell, which shards couldn't be read or are gone from the input,
each run has recorded before the manifest said so; replayed in their order, the records tell it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.commit.manifest import ManifestRow
from pipeline.predictions import read_footer
from pipeline.storage import ObjectChanged, ObjectInfo, ObjectNotFound, Storage, StorageError

_READERS = 32

_AT_ONCE = 1000


def prediction_files(storage: Storage, partition: str) -> Iterator[ObjectInfo]:
    """Lists the prediction files of a partition."""
    files = storage.list(f"{partition}/predictions", missing_ok=True)
    return (info for info in files if info.uri.endswith(".parquet"))


def partition_fingerprint(storage: Storage, partition: str) -> str:
    """The fingerprint of a partition's prediction files; empty where there are none.

    Raises:
        StorageError: a file can't be read, or is no prediction file.
    """
    for info in prediction_files(storage, partition):
        with storage.open(info.uri, info.version) as file:
            return read_footer(info.uri, file).fingerprint
    return ""


def reconcile(
    files: Iterable[ObjectInfo], known: Mapping[str, ManifestRow], partition: str
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
        return ManifestRow.of_file(footer, info.uri.removeprefix(f"{partition}/"), info.version)

    with ThreadPoolExecutor(_READERS, thread_name_prefix="footer") as pool:
        waiting: list[ObjectInfo] = []
        for info in files:
            waiting.append(info)
            if len(waiting) == _AT_ONCE:
                yield from filter(None, pool.map(recover, waiting))
                waiting = []
        yield from filter(None, pool.map(recover, waiting))


@dataclass
class History:
    """What the records of runs tell of shards, and prediction files don't.

    Attributes:
        failures: by URI, the shards that couldn't be read at last.
        gone: the shards that the input no longer had.
    """

    failures: dict[str, ManifestRow] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)


def read_history(storage: Storage, partition: str) -> History:
    """Replays the records of all runs.

    Raises:
        StorageError: one of them is no record of a run.
    """
    history = History()
    uris = sorted(info.uri for info in storage.list(f"{partition}/runs", missing_ok=True))
    with ThreadPoolExecutor(_READERS, thread_name_prefix="record") as pool:
        for uri, content in zip(uris, pool.map(storage.read, uris), strict=True):
            try:
                _replay(json.loads(content), history)
            except (ValueError, TypeError, KeyError) as error:
                raise StorageError(uri, f"not the record of a run: {error!r}") from None
    return history


def _replay(record: Mapping[str, Any], history: History) -> None:
    history.gone -= {*record["removed"], *record["present"]}
    history.gone |= {*record["gone"]}
    for uri in (*record["removed"], *record["cured"]):
        history.failures.pop(uri, None)
    for failure in record["unreadable"]:
        history.failures[failure["uri"]] = ManifestRow(**failure, run=record["run"])


@dataclass
class Repairs:
    """What the manifest lacks of what prediction files and records tell, and what it has too much.

    Attributes:
        rows: by URI, rows that are to be put in.
        removed: shards whose rows are to go.
        cured: shards whose failures are over.
        gone: by URI, whether the input has lost the shard, where the manifest says otherwise.
        entries: the manifest's rows with these repairs, by URI.
    """

    rows: dict[str, ManifestRow]
    removed: set[str]
    entries: dict[str, ManifestRow]
    cured: set[str] = field(default_factory=set)
    gone: dict[str, bool] = field(default_factory=dict)


def find_repairs(
    storage: Storage,
    partition: str,
    fingerprint: str,
    manifest: Mapping[str, ManifestRow],
    in_order: bool,
) -> Repairs:
    """Finds out how the manifest differs from what it is made from.

    Prediction files are looked at always, for they are the truth, whoever wrote them; the records of runs
    only where the last one died.

    Args:
        storage: access to the partition.
        partition: its URI.
        fingerprint: its fingerprint.
        manifest: its rows, by URI, as `Manifest.entries` reads them.
        in_order: whether the last run left everything in order, and the manifest is there.

    Raises:
        StorageError: something there is no prediction file of this partition, or no record.
    """
    failing = {uri for uri, row in manifest.items() if row.error is not None}
    unlisted, lost = reconcile(prediction_files(storage, partition), manifest, partition)
    found = {row.uri: row for row in recovered_rows(storage, partition, fingerprint, unlisted)}
    removed = set(lost) - found.keys()
    kept = {uri: row for uri, row in manifest.items() if uri not in removed}
    repairs = Repairs(dict(found), removed, kept | found)
    # A file that the manifest doesn't know is newer than all it knows; without a manifest, none is.
    newer: AbstractSet[str] = found.keys() if manifest else set()
    repairs.cured |= newer & failing
    if not in_order:
        _apply(read_history(storage, partition), newer, repairs)
    return repairs


def _apply(history: History, newer: AbstractSet[str], repairs: Repairs) -> None:
    """Brings what is known of failures and of gone shards in line with the records."""
    known = repairs.entries
    for uri in newer & history.failures.keys():
        repairs.cured.add(uri)
        del history.failures[uri]
    for uri, row in list(known.items()):
        failure = history.failures.get(uri)
        if row.gone != (uri in history.gone):
            repairs.gone[uri] = not row.gone
            known[uri] = row = replace(row, gone=not row.gone)
        if failure is None and row.error is not None:
            if row.output is None:
                repairs.removed.add(uri)
                del known[uri]
            else:
                repairs.cured.add(uri)
                known[uri] = replace(row, error=None, failed_version=None)
        elif failure is not None and (row.error, row.failed_version) != (
            failure.error,
            failure.failed_version,
        ):
            repairs.rows[uri] = _failed(repairs.rows.get(uri), failure)
            known[uri] = replace(row, error=failure.error, failed_version=failure.failed_version)
    for uri, failure in history.failures.items():
        if uri not in known.keys() | repairs.removed:
            repairs.rows[uri] = failure
            known[uri] = failure


def _failed(labelled: ManifestRow | None, failure: ManifestRow) -> ManifestRow:
    """A failure; where an earlier version of the shard is labelled, in its row."""
    if labelled is None:
        return failure
    return replace(labelled, error=failure.error, failed_version=failure.failed_version)


def rebuilt_rows(storage: Storage, partition: str, fingerprint: str) -> list[ManifestRow]:
    """All manifest rows anew, sorted by URI: from prediction files and the records of runs.

    Raises:
        StorageError: one of them is no prediction file of this partition, or no record.
    """
    files = prediction_files(storage, partition)
    rows = {row.uri: row for row in recovered_rows(storage, partition, fingerprint, files)}
    history = read_history(storage, partition)
    for uri in history.gone & rows.keys():
        rows[uri] = replace(rows[uri], gone=True)
    for uri, failure in history.failures.items():
        rows[uri] = _failed(rows.get(uri), failure)
    return [rows[uri] for uri in sorted(rows)]
