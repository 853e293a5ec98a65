"""What a run is about to do, found out without doing it: the input's listing, the plan, and repairs."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.commit import Repairs, find_repairs, left_in_order
from pipeline.config import LABEL_NEW, Config, Selection, make_storage
from pipeline.read import ShardListing, list_shards
from pipeline.run.inputs import check_groups, check_places
from pipeline.run.job import Job, check_room, make_job
from pipeline.run.planning import Plan, plan


@dataclass(frozen=True)
class PreparedRun:
    """A job, and what there is to do.

    Attributes:
        job: the job.
        plan: which shards are in which state, and what is to be labeled.
        repairs: how the manifest differs from what it is made from.
        in_order: whether the last run left manifest and statistics up to date, and the manifest is there.
    """

    job: Job
    plan: Plan
    repairs: Repairs
    in_order: bool

    @property
    def failing(self) -> frozenset[str]:
        """Shards that could not be read by the last run that tried."""
        return frozenset(uri for uri, row in self.repairs.entries.items() if row.error is not None)


def plan_run(config: Config, selection: Selection = LABEL_NEW) -> PreparedRun:
    """Plans a run: nothing is written, and Ray is not needed.

    Args:
        config: the job's configuration.
        selection: what is labeled besides new and changed shards.

    Raises:
        StorageError: the input can't be listed, or the output not read.
        NoShardsError: nothing in the input is a shard.
        ConfigError: the output lies in the input, or an option doesn't fit the model.
        CheckpointError: the model can't be loaded.
    """
    listing = open_listing(config)
    job = make_job(config)
    return prepare(job, listing, selection, left_in_order(job.storage, job.partition.uri))


def open_listing(config: Config) -> ShardListing:
    """Starts the listing of the input, and checks that it has a shard.

    Raises:
        StorageError: the input can't be listed.
        NoShardsError: nothing in the input is a shard.
        ConfigError: the output lies in the input.
    """
    check_places(config)
    listing = list_shards(make_storage(config.storage), config.input.uri, config.input.format)
    listing.require_any()
    return listing


def prepare(job: Job, listing: ShardListing, selection: Selection, in_order: bool) -> PreparedRun:
    """Reads the manifest, finds its repairs, and plans.

    Args:
        job: the job.
        listing: the input's; read to its end.
        selection: what is labeled besides new and changed shards.
        in_order: whether the last run left everything in order, as its lease says.

    Raises:
        StorageError: input or output can't be read.
        ConfigError: images would be labeled twice, or a prediction file's name is too long.
    """
    partition, manifest = job.partition, job.partition.manifest
    in_order = in_order and manifest.exists()
    repairs = find_repairs(partition.storage, partition.uri, job.fingerprint, manifest.entries(), in_order)
    check_groups(repairs.entries, job.config.input.uri)
    planned = plan(listing, repairs.entries, selection)
    check_room(partition, planned.shards)
    return PreparedRun(job, planned, repairs, in_order)
