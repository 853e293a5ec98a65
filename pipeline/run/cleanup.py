"""What a run does beside labelling: it brings manifest and prediction files in line with the input.

Labels are removed of shards that the input no longer has, if that is asked for, and of groups of loose
images that are grouped otherwise now.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pyarrow.parquet as pq

from pipeline.commit import Known, Lease, Repairs, RunRecord
from pipeline.predictions import prediction_path
from pipeline.read import list_shards
from pipeline.run.job import Job
from pipeline.run.planning import Work
from pipeline.storage import ObjectChanged, ObjectNotFound


def tidy(job: Job, work: Work, repairs: Repairs, record: RunRecord, lease: Lease) -> bool:
    """Brings manifest and files in line with the listing, before anything is labelled; says if it had to.

    Labels of images that now belong to another group are removed first, so that no image is ever seen
    in two groups' files.

    Args:
        job: whose labels they are.
        work: which shards are in which state; what is removed is no longer expected to be there.
        repairs: how the manifest differs from what it is made from.
        record: notes what happens to shards, before the manifest says so.
        lease: the run's, which must hold.

    Raises:
        StorageError: something can't be read, written or removed.
        LeaseLostError: another run has taken over.
    """
    labelled = work.labelled_gone
    to_remove = work.to_prune
    to_remove |= _regrouped(job, labelled, work)
    to_remove |= {uri for uri in work.moved if uri in work.expected}
    versions = {uri: row.output_version for uri, row in labelled.items()} | work.expected
    lease.check()
    remove(job, {uri: versions[uri] for uri in to_remove})
    for uri in to_remove:
        work.expected.pop(uri, None)
    removed = to_remove | repairs.removed | (work.gone.keys() - labelled.keys())
    gone = [uri for uri, row in labelled.items() if uri not in removed and not row.gone]
    rows = {uri: row for uri, row in repairs.rows.items() if uri not in removed}
    cured = repairs.cured.union(work.cured) - removed
    record.shards("removed", removed)
    record.shards("gone", gone)
    record.shards("present", work.returned)
    record.shards("cured", cured)
    record.save()
    is_gone = repairs.gone | dict.fromkeys(gone, True) | dict.fromkeys(work.returned, False)
    if not (rows or removed or cured or is_gone):
        return False
    job.partition.manifest.update(rows, removed, is_gone, cured)
    return True


def remove(job: Job, versions: Mapping[str, str | None]) -> None:
    """Removes shards' prediction files, except those that another run has meanwhile written anew.

    Args:
        job: whose they are.
        versions: of each file, by its shard's URI.

    Raises:
        StorageError: one can't be removed.
    """

    def remove_one(shard: tuple[str, str | None]) -> None:
        uri, version = shard
        with suppress(ObjectChanged):
            job.partition.storage.delete(f"{job.partition.uri}/predictions/{prediction_path(uri)}", version)

    with ThreadPoolExecutor(16, thread_name_prefix="remove") as pool:
        deque(pool.map(remove_one, versions.items()), 0)


def _regrouped(job: Job, labelled: Mapping[str, Known], work: Work) -> set[str]:
    """Groups of loose images that are gone, but of which images are in other groups now."""
    groups = {uri: row for uri, row in labelled.items() if row.format == "images"}
    if not work.shards and all(row.gone for row in groups.values()):
        return set()  # as it was when they were found to be gone

    def images(group: tuple[str, Known]) -> list[tuple[str, str]]:
        uri, row = group
        try:
            with job.partition.storage.open(f"{job.partition.uri}/{row.output}") as file:
                keys = pq.read_table(file, columns=["key"])["key"].to_pylist()
        except ObjectNotFound:
            return []
        return [(f"{uri.rpartition('/')[0]}/{key}", uri) for key in keys]

    with ThreadPoolExecutor(16, thread_name_prefix="keys") as pool:
        group_of = dict(image for found in pool.map(images, groups.items()) for image in found)
    return grouped_otherwise(job, group_of)


def grouped_otherwise(job: Job, group_of: Mapping[str, str]) -> set[str]:
    """Of groups of loose images, by image, those of which the input has images in other groups now.

    Raises:
        StorageError: the input can't be listed.
    """
    if not group_of:
        return set()
    section = job.config.input
    listing = list_shards(job.partition.storage, section.uri, section.format)
    members = ((member.uri, shard.uri) for shard in listing for member in shard.members)
    return {group_of[uri] for uri, group in members if group_of.get(uri, group) != group}
