"""Manifest rows from prediction files, and from the records of runs: after a run that died, and to make the
manifest anew.

Files tell what is labelled. What they can't tell, which shards couldn't be read or are gone from the input,
each run has recorded before the manifest said so; replayed in their order, the records tell it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.committing import labelled_row
from pipeline.manifest import ManifestRow
from pipeline.planning import Known
from pipeline.predictions import read_footer
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
    try:
        uris = sorted(info.uri for info in storage.list(f"{partition}/runs"))
    except ObjectNotFound:  # a local folder that isn't there yet
        return history
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
        labelled = rows.get(uri)
        if labelled is not None:
            failure = replace(labelled, error=failure.error, failed_version=failure.failed_version)
        rows[uri] = failure
    return [rows[uri] for uri in sorted(rows)]
