"""Removes obsolete labels: of deleted shards if the selection prunes, of regrouped images, of parts."""

from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from pipeline.commit import (
    LeaseLostError,
    ManifestRow,
    Partition,
    hold_rows,
    prediction_files,
    recovered_rows,
)
from pipeline.predictions import prediction_path
from pipeline.read import Shard, overlap
from pipeline.run.planning import find_regrouped
from pipeline.run.recording import RunContext
from pipeline.storage import ObjectChanged, ObjectNotFound, read_table

_THREADS = 16


def clean_up(run: RunContext) -> bool:
    """Removes obsolete labels, and repairs the manifest; returns whether the manifest changed.

    This precedes labeling, so that no regrouped image is ever visible in two prediction files. The run record
    is written before the manifest.
    """
    plan, repairs, record, partition = run.result.plan, run.prepared.repairs, run.record, run.result.partition
    labeled = plan.deleted_with_labels
    to_remove = plan.to_prune | plan.replaced | _regrouped_since(run)
    versions = {uri: row.output_version for uri, row in labeled.items()} | {**plan.expected}
    run.lease.check()
    files = {f"{partition.uri}/predictions/{prediction_path(uri)}" for uri in to_remove}
    hold_rows(plan.copied.values(), partition.storage, files, run.result.job.stages.predictions)
    _remove(partition, {uri: versions.get(uri) for uri in to_remove})
    for uri in to_remove:  # no file is expected in place of a removed file
        plan.expected.pop(uri, None)
    removed = to_remove | repairs.removed | (plan.deleted.keys() - labeled.keys())
    deleted = [uri for uri, row in labeled.items() if uri not in removed and not row.deleted]
    rows = {uri: row for uri, row in repairs.rows.items() if uri not in removed}
    recovered = repairs.recovered.union(plan.recovered) - removed
    record.add_shards("removed", removed)
    record.add_shards("deleted", deleted)
    record.add_shards("reappeared", plan.reappeared)
    record.add_shards("recovered", recovered)
    record.save()
    deletions = repairs.deleted | dict.fromkeys(deleted, True) | dict.fromkeys(plan.reappeared, False)
    if not (rows or removed or recovered or deletions):
        return False
    partition.manifest.update(rows, removed, deletions, recovered)
    return True


def _remove(partition: Partition, versions: Mapping[str, str | None]) -> None:
    """Removes prediction files in these versions, by shard; keeps a file that another run has rewritten."""

    def remove_one(shard: tuple[str, str | None]) -> None:
        uri, version = shard
        with suppress(ObjectChanged):
            partition.storage.delete(f"{partition.uri}/predictions/{prediction_path(uri)}", version)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="remove") as pool:
        deque(pool.map(remove_one, versions.items()), 0)


def roll_back_regrouped(run: RunContext) -> set[str]:
    """Removes labels that this run wrote for images that are in other groups by now; returns the groups.

    Also removes parts of a file that the run that holds the lease divides differently. Only an overlapping
    run that labeled the new groups or parts makes this necessary. Its sign is a prediction file that this
    run neither found nor wrote, or that has another version of a group.
    """
    partition, groups = run.result.partition, run.groups
    if not groups:
        return set()
    labeled = [shard for shard in run.result.plan.shards if shard.uri in groups]
    entries = run.prepared.repairs.entries.values()
    versions = {row.output: row.output_version for row in entries if row.output} | run.outputs
    unknown = [
        file
        for file in prediction_files(partition.storage, partition.uri)
        if versions.get(file.uri.removeprefix(f"{partition.uri}/")) != file.version
    ]
    if not unknown and all(groups[shard.uri].version == shard.version for shard in labeled):
        return set()
    moved = find_regrouped(
        run.relist(), {member.uri: shard.uri for shard in labeled for member in shard.members}
    )
    try:
        run.lease.verify()
    except LeaseLostError:
        planned = {(shard.uri, shard.version) for shard in labeled}
        for row in recovered_rows(partition.storage, partition.uri, unknown):
            if (row.uri, row.version) not in planned:  # both runs may have a part in common, which stays
                moved |= {shard.uri for shard in labeled if overlap(shard, row.uri, row.version or "")}
    _remove(partition, {uri: groups[uri].output_version for uri in moved})
    return moved


def _regrouped_since(run: RunContext) -> set[str]:
    """Returns deleted groups of image files that lost images to other groups."""
    plan, partition = run.result.plan, run.result.partition
    groups = {uri: row for uri, row in plan.deleted_with_labels.items() if row.format == "images"}
    # A group that gained an image has changed, so the plan has the group.
    gaining: Iterable[Shard] = [shard for shard in plan.shards if shard.members]
    if groups.keys() & run.prepared.repairs.rows.keys():  # overlapping runs may have labeled both groups
        gaining = run.relist()
    if not gaining or not groups:
        return set()

    def images(group: tuple[str, ManifestRow]) -> list[tuple[str, str]]:
        uri, row = group
        try:
            with partition.storage.open(f"{partition.uri}/{row.output}") as file:
                keys = read_table(file, ["key"])["key"].to_pylist()
        except ObjectNotFound:
            return []
        return [(f"{uri.rpartition('/')[0]}/{key}", uri) for key in keys]

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="keys") as pool:
        group_of = dict(image for found in pool.map(images, groups.items()) for image in found)
    return find_regrouped(gaining, group_of)
