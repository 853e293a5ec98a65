"""What a run is about to do, found out without doing it: the input's listing, the plan, and repairs."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.commit import ManifestRow, Repairs, find_repairs, left_in_order
from pipeline.config import LABEL_NEW, Config, ConfigError, Selection, make_storage
from pipeline.read import ShardListing, list_shards
from pipeline.run.job import Job, check_room, make_job
from pipeline.run.planning import Plan, plan
from pipeline.storage import lies_in


@dataclass(frozen=True)
class PreparedRun:
    """A job, and what there is to do.

    Attributes:
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
    source, target = config.input.uri, config.output.uri
    if lies_in(target, source):
        raise ConfigError(f"output.uri: {target} lies in the input, {source}: labels would be read as shards")
    return list_shards(make_storage(config.storage), source, config.input.format).require_any()


def prepare(job: Job, listing: ShardListing, selection: Selection, in_order: bool) -> PreparedRun:
    """Reads the listing to its end and the manifest, finds its repairs, and plans.

    Raises:
        StorageError: input or output can't be read.
        ConfigError: images would be labeled twice, or a prediction file's name is too long.
    """
    partition, manifest = job.partition, job.partition.manifest
    in_order = in_order and manifest.exists()
    repairs = find_repairs(partition.storage, partition.uri, job.fingerprint, manifest.entries(), in_order)
    _check_groups(repairs.entries, job.config.input.uri)
    planned = plan(listing, repairs.entries, selection)
    check_room(partition, planned.shards)
    return PreparedRun(job, planned, repairs, in_order)


def _check_groups(manifest: Mapping[str, ManifestRow], input_uri: str) -> None:
    """Refuses an input inside a folder whose image files are labeled already, in groups of their own."""
    for uri, row in manifest.items():
        folder = uri.rpartition("/")[0]
        if row.format == "images" and row.output is not None and input_uri.startswith(f"{folder}/"):
            raise ConfigError(
                f"input.uri: {input_uri} lies in {folder}, whose loose images have labels in this output: "
                "label all of them, or choose another output.uri, or they would be labelled twice"
            )
