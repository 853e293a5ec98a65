"""The plan of a run: `plan` is a pure function of the input's listing and the manifest."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial

from pipeline.commit import ManifestRow, Partition, Repairs, find_repairs, was_clean_shutdown
from pipeline.config import LABEL_NEW, WHOLE, Config, ConfigError, Selection, Share, make_storage
from pipeline.predictions import read_footer
from pipeline.read import Shard, ShardListing, divide_files, list_shards, select_images, whole_file
from pipeline.run.copied_rows import CopiedRows, find_copied_rows, find_replaced_groups
from pipeline.run.job import Job, make_job
from pipeline.text import pluralize

#: The row of a shard that the manifest does not have.
NO_ROW = ManifestRow("")


class ShardState(StrEnum):
    """State of a shard, from the listing and the manifest."""

    NEW = "new"
    CHANGED = "changed"
    DONE = "done"
    FAILED = "failed"  # an earlier run could not read this version
    DELETED = "deleted"  # the manifest has the shard, the input does not


@dataclass
class Plan:
    """The plan of a run: of its share, except for `listing` and `groups`.

    Attributes:
        listing: the listing of the input, which has counts of the ignored objects.
        shards: the shards to label, in listing order.
        states: number of shards by state.
        skipped: manifest rows of unreadable shards that are not retried.
        damaged: number of shards whose labels end where an earlier run could not read further.
        deleted: manifest rows of shards that were deleted from the input, by URI.
        updated: new rows of shards that the manifest marks as deleted and that the input has again, and of
            labeled shards whose later version was unreadable if the input has the labeled version again.
        replaced: shards whose rows may be in other shards now: changed parts of a file, other parts than
            those of the listing, groups of image files that lost images to a new group directly after them,
            and ranges of a table that lost rows to other ranges. Their labels are removed before labeling,
            so that no row is in two prediction files.
        parts: labeled parts of a file that is one shard now and has no labels yet, by URI of the file. Their
            labels stay until the file is read: it may be unreadable.
        image_states: number of images by state; None unless the input has image files or tables only.
        copied: the stored rows that a shard to label copies, by URI; only the other images are read.
        groups: groups of image files of other inputs that this input replaces, in every share.
    """

    listing: ShardListing
    selection: Selection
    share: Share = WHOLE
    groups: Collection[str] = ()
    shards: list[Shard] = field(default_factory=list)
    states: Counter[ShardState] = field(default_factory=Counter)
    skipped: list[ManifestRow] = field(default_factory=list)
    damaged: int = 0
    deleted: dict[str, ManifestRow] = field(default_factory=dict)
    updated: dict[str, ManifestRow] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    parts: defaultdict[str, list[ManifestRow]] = field(default_factory=lambda: defaultdict(list))
    image_states: Counter[ShardState] | None = None
    copied: dict[str, CopiedRows] = field(default_factory=dict)

    def is_own(self, shard: Shard | ManifestRow) -> bool:
        """Returns whether a shard, which may be deleted, is in the share of the run.

        Shards are in one share if a change of the input may move rows between them: the parts of a file, the
        ranges of a table, and all groups of image files under one URI of the input, also those
        that another input has made.
        """
        if self.share.count == 1:
            return True
        if shard.format == "images":
            root = self.listing.inputs.root_of(shard.uri) or shard.uri.rpartition("/")[0]
            return shard.uri in self.groups or self.share.contains(root)
        return self.share.contains(_find_in(shard.uri, self.listing.tables) or whole_file(shard.uri))

    @property
    def deleted_with_labels(self) -> dict[str, ManifestRow]:
        """Rows of shards that were deleted from the input and still have labels."""
        return {uri: row for uri, row in self.deleted.items() if row.output is not None}

    @property
    def to_prune(self) -> set[str]:
        """Deleted shards whose labels the run removes; not those whose rows other shards have now."""
        return self.deleted_with_labels.keys() - self.replaced if self.selection.prune else set()

    @property
    def images(self) -> int | None:
        """Number of images to label; None unless the listing gives it, as for image files and tables."""
        if not all(shard.images for shard in self.shards):
            return None
        return sum(shard.images or 0 for shard in self.shards) - self.copied_images

    @property
    def copied_images(self) -> int:
        """Number of images whose stored rows are copied."""
        return sum(len(copied.positions) for copied in self.copied.values())

    def without_copied(self, shard: Shard) -> Shard:
        """Returns the shard to read: without the images whose stored rows are copied."""
        copied = self.copied.get(shard.uri)
        return shard if copied is None else select_images(shard, copied.missing)

    def describe(self) -> str:
        """Describes the input: counts by state, to label and to prune. Counts images if possible."""
        unit, states, to_label, copied = "shard", self.states, len(self.shards), 0
        to_prune = len(self.to_prune)
        if self.image_states is not None:
            unit, states, to_label, copied = "image", self.image_states, self.images or 0, self.copied_images
            to_prune = sum(self.deleted[uri].rows or 0 for uri in self.to_prune)
        found = [f"{states[state]:,} {state}" for state in ShardState if states[state]]
        if self.damaged:
            found.append(f"{self.damaged:,} of the done only in part")
        is_divided = self.share.count > 1
        if is_divided and not self.states.total():
            return f"share {self.share} has no shards: the other shares have them"
        total = pluralize(states.total(), unit) + (f" in share {self.share}" if is_divided else "")
        text = f"{total}: {', '.join(found)}; {to_label:,} to label"
        if again := to_label + copied - states[ShardState.NEW] - states[ShardState.CHANGED]:
            text += f" ({again:,} reprocessed)"
        if copied:
            text += f" ({copied:,} unchanged are copied)"
        if self.selection.prune:
            text += f", {to_prune:,} to prune"
        return text


def plan(
    listing: ShardListing,
    manifest: Mapping[str, ManifestRow],
    selection: Selection,
    keep: bool = False,
    groups: Collection[str] = (),
    share: Share = WHOLE,
) -> Plan:
    """Compares the input with the manifest, without rows of other inputs; reads the listing to its end.

    With `keep`, the readable parts of damaged shards are due. For `groups`, see `find_replaced_groups`.
    """
    planned, images, seen = Plan(listing, selection, share, groups), Counter[ShardState](), set[str]()
    formats, files, unlabeled = set[str | None](), set[str](), set[str]()
    last_changed: str | None = None  # the preceding group of image files, if it changed
    for shard in listing:
        if not planned.is_own(shard):
            continue
        row = manifest.get(shard.uri, NO_ROW)
        state = _state(shard, row)
        planned.states[state] += 1
        images[state] += shard.images or 0
        seen.add(shard.uri)
        failed = row.failed_version == shard.version
        if state is ShardState.DONE and row.error is not None and not failed:
            planned.updated[shard.uri] = row.with_state(NO_ROW.state)
        elif row.deleted:
            planned.updated[shard.uri] = replace(row, deleted=False)
        is_due = state in (ShardState.NEW, ShardState.CHANGED) or selection.relabel
        is_due |= keep and failed and row.readable_rows is not None
        if is_due or (selection.retry_errors and (failed or row.errors or row.damage)):
            planned.shards.append(shard)
        elif state is ShardState.FAILED:
            planned.skipped.append(row)
        elif row.damage is not None:
            planned.damaged += 1
        formats.add(shard.format)
        is_changed = state is ShardState.CHANGED and row.output is not None
        if shard.format == "images":
            if (row.version is None or row.deleted) and last_changed is not None:
                planned.replaced.add(last_changed)
            if state is not ShardState.NEW:
                last_changed = shard.uri if is_changed else None
            continue
        files.add(shard.object.uri)
        if row.output is None:
            unlabeled.add(shard.uri)
        # With other columns of `input.carry`, a part has the same rows.
        has_same_rows = shard.version.split("/carry-")[0] == (row.version or "").split("/carry-")[0]
        if shard.span and is_changed and not has_same_rows:
            planned.replaced.add(shard.uri)
    files |= listing.tables  # files that are not in the snapshot have rows that others have now, or none
    planned.deleted = {
        uri: row
        for uri, row in manifest.items()
        if uri not in seen
        and listing.format in (None, row.format)
        and (listing.inputs.contains(uri) or uri in groups or _find_in(uri, files))
        and planned.is_own(row)
    }
    for uri in [uri for uri in planned.deleted_with_labels if whole_file(uri) in unlabeled]:
        planned.parts[whole_file(uri)].append(planned.deleted.pop(uri))
    replaced = {uri for uri in planned.deleted if _find_in(uri, files)}
    planned.replaced |= replaced & planned.deleted_with_labels.keys()
    planned.states[ShardState.DELETED] = len(planned.deleted) - len(replaced)
    if formats.union(row.format for row in planned.deleted.values()) <= {"images", "table"}:
        images[ShardState.DELETED] = sum(
            row.rows or 0 for uri, row in planned.deleted.items() if uri not in replaced
        )
        planned.image_states = images
    return planned


def _find_in(uri: str, files: Set[str]) -> str:
    """Returns the file or table that a shard is, is a part of, or is in; empty if these have no such file."""
    while uri and uri not in files:
        uri = uri.rpartition("/")[0]
    return uri


def _state(shard: Shard, row: ManifestRow) -> ShardState:
    if row.version is row.failed_version is None:
        return ShardState.NEW
    if row.version == shard.version:
        return ShardState.DONE
    if row.failed_version != shard.version:
        return ShardState.CHANGED
    # A shard that failed under another `input.format` may be readable under this one.
    is_same_format = row.version is not None or row.format == shard.format
    return ShardState.FAILED if is_same_format else ShardState.NEW


@dataclass(frozen=True)
class PreparedRun:
    """A job, its plan, the repairs of the manifest, and whether manifest and statistics were up to date."""

    job: Job
    plan: Plan
    repairs: Repairs
    clean_shutdown: bool


def plan_run(config: Config, selection: Selection = LABEL_NEW) -> PreparedRun:
    """Plans a run without writing anything; needs no Ray.

    Raises:
        CheckpointError: the model can't be loaded.
        StorageError: the input can't be listed, or the output can't be read.
        NoShardsError: the input has no shard.
        ConfigError: an option does not fit the model, the input or the stored labels.
    """
    listing = open_listing(config)
    job = make_job(config)
    clean_shutdown = was_clean_shutdown(job.storage, job.partition.uri, Share.parse(config.run.share))
    return prepare(job, listing, selection, clean_shutdown)


def open_listing(config: Config) -> ShardListing:
    """Starts to list the input; raises as `plan_run`, also if the output is inside the input."""
    inputs, target = config.input.inputs, config.output.uri
    if inputs.covers(target):
        raise ConfigError(
            f"output.uri: {target} is inside the input, {inputs}; later runs would read the labels as "
            "shards. Choose an output.uri outside of input.uri"
        )
    return list_input(config).require_shards("input.uri")


def list_input(config: Config) -> ShardListing:
    """Lists the shards of the input: files, parts of large files, and groups of image files."""
    storage, section = make_storage(config.storage), config.input
    listing = list_shards(storage, section)
    return listing.replace(
        lambda shards: divide_files(storage, shards, config.read.split_bytes, section.carry, section.key)
    )


def prepare(job: Job, listing: ShardListing, selection: Selection, clean_shutdown: bool) -> PreparedRun:
    """Reads the manifest and the rest of the listing, finds repairs, and plans; raises as `plan_run`."""
    partition, manifest = job.partition, job.partition.manifest
    clean_shutdown = clean_shutdown and manifest.exists()
    repairs = find_repairs(partition, job.fingerprint, manifest.entries(), clean_shutdown)
    groups = find_replaced_groups(partition, repairs, listing)
    keep = job.stages.read_options.input.on_damaged_shard == "keep"
    share = Share.parse(job.config.run.share)
    planned = plan(listing, repairs.entries, selection, keep, groups, share)
    entries, shards = repairs.entries, planned.shards
    # Rows move to a group that was split from theirs, to the group before a deleted one, or in a table.
    losing = [entries[uri] for uri in planned.replaced | planned.deleted_with_labels.keys()]
    losing = [row for row in losing if row.format in ("images", "table")]
    has_overlapped = any(row.uri in repairs.found for row in losing)  # may have labeled other groups as well
    gaining = list_input(job.config) if has_overlapped else shards
    if selection.relabel:  # nothing is copied, but rows may have moved
        shards = [shard for shard in shards if entries.get(shard.uri, NO_ROW).version != shard.version]
    read_options, with_errors = job.stages.read_options, not selection.retry_errors
    copied, shifted = find_copied_rows(partition, shards, gaining, entries, losing, read_options, with_errors)
    planned.replaced |= shifted
    planned.copied = {} if selection.relabel else copied
    if planned.shards and job.config.classify.runtime == "auto":
        job = replace(job, labeled_by=_stored_runtime(partition, entries))
    if share.count > 1:  # a run repairs only rows of its share
        stored, entries = (
            {uri: row for uri, row in rows.items() if planned.is_own(row)}
            for rows in (repairs.stored, repairs.entries)
        )
        repairs = Repairs(stored, entries, repairs.found)
    return PreparedRun(job, planned, repairs, clean_shutdown)


def _stored_runtime(partition: Partition, entries: Mapping[str, ManifestRow]) -> str | None:
    """Returns the runtime that labeled the first shard of a partition; None without labels."""
    for row in entries.values():
        if row.output is not None:
            uri = f"{partition.uri}/{row.output}"
            footer = partition.storage.read_latest(uri, partial(read_footer, uri))
            return None if footer is None else footer.content.runtime
    return None
