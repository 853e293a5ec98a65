"""Brings manifest and prediction files in line with the input, before anything is labeled.

Labels are removed of deleted shards, where that is asked for, and of groups of image files whose images
are in other groups now.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pyarrow.parquet as pq

from pipeline.commit import ManifestRow, Partition, prediction_files
from pipeline.predictions import prediction_path
from pipeline.read import Shard
from pipeline.run.planning import regrouped
from pipeline.run.recording import RunContext
from pipeline.storage import ObjectChanged, ObjectNotFound

_THREADS = 16


def clean_up(run: RunContext) -> tuple[set[str], bool]:
    """Removes labels and rows that must go, and repairs the manifest; first writes the record.

    Labels of images that now belong to another group are removed first, so that no image is ever visible
    in two groups' files.
    Returns the shards whose labels were removed, and whether anything was changed.
    """
    plan, repairs, record, partition = run.result.plan, run.prepared.repairs, run.record, run.result.partition
    labeled = plan.deleted_with_labels
    to_remove = plan.to_prune | _regrouped(run)
    to_remove |= {uri for uri in plan.split_groups if uri in plan.expected}
    versions = {uri: row.output_version for uri, row in labeled.items()} | {**plan.expected}
    run.lease.check()
    _remove(partition, {uri: versions[uri] for uri in to_remove})
    removed = to_remove | repairs.removed | (plan.deleted.keys() - labeled.keys())
    deleted = [uri for uri, row in labeled.items() if uri not in removed and not row.deleted]
    rows = {uri: row for uri, row in repairs.rows.items() if uri not in removed}
    recovered = repairs.recovered.union(plan.recovered) - removed
    record.shards("removed", removed)
    record.shards("deleted", deleted)
    record.shards("reappeared", plan.reappeared)
    record.shards("recovered", recovered)
    record.save()
    is_deleted = repairs.deleted | dict.fromkeys(deleted, True) | dict.fromkeys(plan.reappeared, False)
    if not (rows or removed or recovered or is_deleted):
        return to_remove, False
    partition.manifest.update(rows, removed, is_deleted, recovered)
    return to_remove, True


def _remove(partition: Partition, versions: Mapping[str, str | None]) -> None:
    """Removes prediction files of these versions, by shard; not those that another run has rewritten."""

    def remove_one(shard: tuple[str, str | None]) -> None:
        uri, version = shard
        with suppress(ObjectChanged):
            partition.storage.delete(f"{partition.uri}/predictions/{prediction_path(uri)}", version)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="remove") as pool:
        deque(pool.map(remove_one, versions.items()), 0)


def withdraw_regrouped(run: RunContext) -> set[str]:
    """Removes what a run labeled of image files that the input has in other groups meanwhile.

    That matters only where another run has labeled those other groups, knowing nothing of this run: where
    there is a prediction file that this run neither found nor wrote, or of another version of a group.
    Returns the groups whose labels were removed.
    """
    partition, groups = run.result.partition, run.groups
    if not groups:
        return set()
    labeled = [shard for shard in run.result.plan.shards if shard.uri in groups]
    rows = [*run.prepared.repairs.entries.values(), *groups.values()]
    versions = {row.output: row.output_version for row in rows if row.output}
    files = prediction_files(partition.storage, partition.uri)
    if all(groups[shard.uri].version == shard.version for shard in labeled) and all(
        versions.get(file.uri.removeprefix(f"{partition.uri}/")) == file.version for file in files
    ):
        return set()
    moved = regrouped(run.relist(), {member.uri: shard.uri for shard in labeled for member in shard.members})
    _remove(partition, {uri: groups[uri].output_version for uri in moved})
    return moved


def _regrouped(run: RunContext) -> set[str]:
    """Deleted groups of image files, some of whose images are in other groups now."""
    plan, partition = run.result.plan, run.result.partition
    groups = {uri: row for uri, row in plan.deleted_with_labels.items() if row.format == "images"}
    # An image that is in another group now has changed that group, so it is planned.
    gaining: Iterable[Shard] = [shard for shard in plan.shards if shard.members]
    if groups.keys() & run.prepared.repairs.rows.keys():  # unless overlapping runs wrote both
        gaining = run.relist()
    if not gaining or not groups:
        return set()

    def images(group: tuple[str, ManifestRow]) -> list[tuple[str, str]]:
        uri, row = group
        try:
            with partition.storage.open(f"{partition.uri}/{row.output}") as file:
                keys = pq.read_table(file, columns=["key"])["key"].to_pylist()
        except ObjectNotFound:
            return []
        return [(f"{uri.rpartition('/')[0]}/{key}", uri) for key in keys]

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="keys") as pool:
        group_of = dict(image for found in pool.map(images, groups.items()) for image in found)
    return regrouped(gaining, group_of)
