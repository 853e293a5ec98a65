"""What is left to do: `plan` is a pure function of the input's listing and the manifest."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pipeline.commit import ManifestRow, Repairs, find_repairs, left_in_order
from pipeline.config import LABEL_NEW, Config, ConfigError, Selection, make_storage
from pipeline.read import Shard, ShardListing, list_shards
from pipeline.run.job import Job, check_room, make_job
from pipeline.storage import is_under

#: The row of a shard that the manifest does not have.
_UNKNOWN = ManifestRow("")


class ShardState(StrEnum):
    """What a shard is to a plan."""

    NEW = "new"
    CHANGED = "changed"
    DONE = "done"
    FAILED = "failed"  # this version of it could not be read
    DELETED = "deleted"  # deleted from the input


@dataclass
class Plan:
    """What a run has to do.

    Attributes:
        shards: the shards to label, in the order of the listing.
        ignored: objects under the input URI that are no shard.
        expected: by URI of a shard to label, the version of its present prediction file.
        reprocessed: how many of `shards` are neither new nor changed.
        skipped_failures: unreadable shards that are not tried again.
        deleted: manifest rows of shards that were deleted from the input.
        reappeared: shards that the manifest calls deleted, and that the input has again.
        recovered: labeled shards of which another version could not be read.
        split_groups: changed groups of image files that lost images to a new group after them.
    """

    selection: Selection
    shards: list[Shard] = field(default_factory=list)
    states: Counter[ShardState] = field(default_factory=Counter)
    ignored: int = 0
    expected: dict[str, str] = field(default_factory=dict)
    reprocessed: int = 0
    skipped_failures: int = 0
    deleted: dict[str, ManifestRow] = field(default_factory=dict)
    reappeared: list[str] = field(default_factory=list)
    recovered: list[str] = field(default_factory=list)
    split_groups: set[str] = field(default_factory=set)

    @property
    def deleted_with_labels(self) -> dict[str, ManifestRow]:
        """Rows of shards that were deleted from the input and still have labels."""
        return {uri: row for uri, row in self.deleted.items() if row.output is not None}

    @property
    def to_prune(self) -> set[str]:
        """Deleted shards whose labels are to be removed."""
        return set(self.deleted_with_labels) if self.selection.prune else set()

    @property
    def images(self) -> int | None:
        """Number of images to label; None unless all are image files, which the listing counts."""
        if not all(shard.members for shard in self.shards):
            return None
        return sum(len(shard.members) for shard in self.shards)


def plan(listing: ShardListing, manifest: Mapping[str, ManifestRow], selection: Selection) -> Plan:
    """Compares the input with what is labeled; reads the listing to its end.

    Only shards under the listing's URI and of its format can be deleted: rows of other inputs are ignored.
    """
    found, seen = Plan(selection), set[str]()
    last_changed: str | None = None  # the preceding group of image files, if it changed
    for shard in listing:
        row = manifest.get(shard.uri, _UNKNOWN)
        state = _state(shard, row)
        found.states[state] += 1
        seen.add(shard.uri)
        failed = row.failed_version == shard.version
        if row.deleted:
            found.reappeared.append(shard.uri)
        if state is ShardState.DONE and row.error is not None and not failed:
            found.recovered.append(shard.uri)
        is_due = state in (ShardState.NEW, ShardState.CHANGED)
        if is_due or selection.relabel or (selection.retry_errors and (failed or row.errors)):
            found.shards.append(shard)
            found.reprocessed += not is_due
            if row.output_version is not None:
                found.expected[shard.uri] = row.output_version
        elif state is ShardState.FAILED:
            found.skipped_failures += 1
        if shard.format == "images":
            if (row.version is None or row.deleted) and last_changed is not None:
                found.split_groups.add(last_changed)
            if state is not ShardState.NEW:
                has_labels = row.output is not None
                last_changed = shard.uri if state is ShardState.CHANGED and has_labels else None
    found.deleted = {
        uri: row
        for uri, row in manifest.items()
        if uri not in seen and is_under(uri, listing.uri) and listing.format in (None, row.format)
    }
    found.states[ShardState.DELETED], found.ignored = len(found.deleted), listing.ignored
    return found


def regrouped(shards: Iterable[Shard], group_of: Mapping[str, str]) -> set[str]:
    """Groups of image files, some of whose images are in another group of these shards.

    `group_of` has the group under which an image is labeled, by the URI of the image.
    """
    members = ((member.uri, shard.uri) for shard in shards for member in shard.members)
    return {group_of[image] for image, group in members if group_of.get(image, group) != group}


def _state(shard: Shard, row: ManifestRow) -> ShardState:
    if row.version is row.failed_version is None:
        return ShardState.NEW
    if row.version == shard.version:
        return ShardState.DONE
    if row.failed_version != shard.version:
        return ShardState.CHANGED
    # A shard that failed under another `input.format` may be readable under this one.
    return ShardState.FAILED if row.version is not None or row.format == shard.format else ShardState.NEW


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


def plan_run(config: Config, selection: Selection = LABEL_NEW) -> PreparedRun:
    """Plans a run: nothing is written, and Ray is not needed.

    Raises:
        CheckpointError: the model can't be loaded.
        StorageError, NoShardsError, ConfigError: as `open_listing` and `prepare`.
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
    if is_under(target, source):
        raise ConfigError(f"output.uri: {target} lies in the input, {source}: labels would be read as shards")
    return list_shards(make_storage(config.storage), source, config.input.format).require_shards()


def prepare(job: Job, listing: ShardListing, selection: Selection, in_order: bool) -> PreparedRun:
    """Reads the listing to its end and the manifest, finds its repairs, and plans.

    Raises:
        StorageError: input or output can't be read.
        ConfigError: the input lies in a folder whose image files are labeled already, in groups of their own,
            or `output.uri` is too long.
    """
    partition, manifest = job.partition, job.partition.manifest
    in_order = in_order and manifest.exists()
    repairs = find_repairs(partition.storage, partition.uri, job.fingerprint, manifest.entries(), in_order)
    for uri, row in repairs.entries.items():
        folder = uri.rpartition("/")[0]
        if row.format == "images" and row.output is not None and listing.uri.startswith(f"{folder}/"):
            raise ConfigError(
                f"input.uri: {listing.uri} lies in {folder}, whose loose images have labels in this output: "
                "label all of them, or choose another output.uri, or they would be labeled twice"
            )
    planned = plan(listing, repairs.entries, selection)
    check_room(partition, planned.shards)
    return PreparedRun(job, planned, repairs, in_order)
