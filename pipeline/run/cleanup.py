"""Removes obsolete labels: of deleted shards if the selection prunes, of regrouped images, of parts."""

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from pipeline.commit import LeaseLostError, ManifestRow, Partition, recovered_rows
from pipeline.read import overlap
from pipeline.run.copied_rows import find_regrouped, read_source
from pipeline.run.planning import NO_ROW, list_input
from pipeline.run.recording import RunContext
from pipeline.storage import ObjectChanged, ObjectNotFound, map_in_threads


def clean_up(run: RunContext) -> bool:
    """Removes obsolete labels, and repairs the manifest; returns whether the manifest changed.

    This precedes labeling, so that no regrouped image is ever visible in two prediction files. The run record
    is written before the manifest.
    """
    plan, repairs, record, partition = run.result.plan, run.prepared.repairs, run.record, run.result.partition
    labeled = plan.deleted_with_labels
    to_remove = plan.to_prune | plan.replaced
    obsolete = [repairs.entries[uri] for uri in to_remove]
    run.lease.check()
    files = {f"{partition.uri}/{row.output}" for row in obsolete}
    sources = {source for each in plan.copied.values() for source in each.rows if source[0] in files}
    read = partial(read_source, storage=partition.storage, options=run.result.job.stages.predictions)
    try:
        run.held.update(zip(sources, map_in_threads(read, sources), strict=True))
    except ObjectNotFound:
        plan.copied.clear()  # another share has images in these groups too, and has removed a group
    remove_labels(partition, obsolete)
    rows = {**repairs.entries, **plan.updated}
    rows |= {uri: replace(row, deleted=True) for uri, row in labeled.items()}
    removed = to_remove | (plan.deleted.keys() - labeled.keys()) | (repairs.stored.keys() - rows.keys())
    added, states = dict[str, ManifestRow](), dict[str, ManifestRow]()
    for uri in rows.keys() - removed:
        row, stored = rows[uri], repairs.stored.get(uri)
        if stored is None or uri in repairs.found:
            added[uri] = row
        elif row is not stored and row.state != stored.state:
            states[uri] = row
    changed = [(repairs.stored.get(uri, NO_ROW), row) for uri, row in (added | states).items()]
    record.add_shards("removed", removed)
    record.add_shards("deleted", [row.uri for old, row in changed if row.deleted and not old.deleted])
    record.add_shards("reappeared", [row.uri for old, row in changed if old.deleted and not row.deleted])
    record.add_shards("recovered", [row.uri for old, row in changed if old.error and not row.error])
    record.save()
    if not (changed or removed):
        return False
    partition.manifest.update(added, removed, states)
    return True


def remove_labels(partition: Partition, rows: Iterable[ManifestRow]) -> None:
    """Removes the prediction files of shards; keeps a file that another run has rewritten."""

    def remove_one(row: ManifestRow) -> None:
        with suppress(ObjectChanged):
            partition.storage.delete(f"{partition.uri}/{row.output}", row.output_version)

    deque(map_in_threads(remove_one, rows), 0)


def roll_back_regrouped(run: RunContext) -> set[str]:
    """Removes labels that this run wrote for images that are in other groups by now; returns the groups.

    Also removes parts of a file that the run that holds the lease divides differently. Only an overlapping
    run that labeled the new groups or parts makes this necessary. Its sign is a prediction file that this
    run neither found nor wrote, or that has another version of a group.
    """
    partition, groups, plan = run.result.partition, run.groups, run.result.plan
    if not groups:
        return set()
    labeled = [shard for shard in plan.shards if shard.uri in groups]
    entries = run.prepared.repairs.entries.values()
    versions = {row.output: row.output_version for row in entries if row.output} | run.outputs
    if plan.share.count > 1:  # files of other shares
        rows = partition.manifest.entries().values()
        versions |= {row.output: row.output_version for row in rows if row.output and not plan.is_own(row)}
    files = (
        file
        for file in partition.prediction_files()
        if versions.get(file.uri.removeprefix(f"{partition.uri}/")) != file.version
    )
    unknown = [row for row in recovered_rows(partition, files) if plan.is_own(row)]
    if not unknown and all(groups[shard.uri].version == shard.version for shard in labeled):
        return set()
    images: dict[str | None, str] = {image.uri: group.uri for group in labeled for image in group.members}
    moved = find_regrouped(list_input(run.result.job.config), images)
    try:
        run.lease.verify()
    except LeaseLostError:
        planned = {(shard.uri, shard.version) for shard in labeled}
        for row in unknown:
            if (row.uri, row.version) not in planned:  # both runs may have a part in common, which stays
                moved |= {shard.uri for shard in labeled if overlap(shard, row.uri, row.version or "")}
    remove_labels(partition, [groups[uri] for uri in moved])
    return moved
