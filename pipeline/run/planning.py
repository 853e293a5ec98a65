"""What is left to do: the listing of the input against the manifest. Only names and versions are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from pipeline.commit import Known
from pipeline.config import Selection
from pipeline.read import Shard
from pipeline.storage import lies_in, normalised


class State(StrEnum):
    """What a shard is to a plan."""

    NEW = "new"
    CHANGED = "changed"
    DONE = "done"
    FAILED = "failed"  # this version of it couldn't be read
    GONE = "gone"  # no longer in the input


@dataclass
class Work:
    """What is to be done.

    Attributes:
        selection: what is labelled beside what is new or has changed.
        shards: what is to be labelled, in the order of the listing.
        expected: by URI, the version of the prediction file that is to be replaced, where there is one.
        states: how many shards of the input are in which state; and those that are gone.
        again: shards of `shards` that are neither new nor changed.
        skipped_failures: shards that couldn't be read, and that are not to be tried again.
        gone: shards that the input no longer has, and what is known of them.
        returned: shards that the manifest calls gone, and that are there again.
        moved: changed groups of loose images that have lost images to a new group after them.
        cured: shards that are labelled as they are, and of which another version couldn't be read.
    """

    selection: Selection
    shards: list[Shard] = field(default_factory=list)
    expected: dict[str, str] = field(default_factory=dict)
    states: Counter[State] = field(default_factory=Counter)
    again: int = 0
    skipped_failures: int = 0
    gone: dict[str, Known] = field(default_factory=dict)
    returned: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    cured: list[str] = field(default_factory=list)

    @property
    def labelled_gone(self) -> dict[str, Known]:
        """Shards that are gone, and whose labels are there."""
        return {uri: row for uri, row in self.gone.items() if row.output is not None}

    @property
    def to_prune(self) -> set[str]:
        """Shards whose labels are to be removed, since the input no longer has them."""
        return set(self.labelled_gone) if self.selection.prune else set()


def compare(
    listing: Iterable[Shard],
    known: dict[str, Known],
    input_uri: str,
    selection: Selection,
    input_format: str = "auto",
) -> Work:
    """Finds out what is to be done.

    Args:
        listing: the shards of the input.
        known: what the manifest knows; what remains in it afterwards is of other inputs.
        input_uri: what was listed: only what lies there can be gone.
        selection: what is labelled beside what is new or has changed.
        input_format: what was looked for: only shards of this format can be gone.
    """
    work = Work(selection)
    last_changed: str | None = None  # the group of loose images just before, if it has changed
    for shard in listing:
        row = known.pop(shard.uri, None)
        state = _state(shard, row)
        work.states[state] += 1
        if row is not None and row.gone:
            work.returned.append(shard.uri)
        failed = row is not None and row.failed_version == shard.version
        if state is State.DONE and row is not None and row.error is not None and not failed:
            work.cured.append(shard.uri)
        has_errors = failed or (row is not None and bool(row.errors))
        again = selection.relabel or (selection.retry_errors and has_errors)
        if state in (State.NEW, State.CHANGED) or again:
            work.shards.append(shard)
            work.again += state not in (State.NEW, State.CHANGED)
            if row is not None and row.output_version is not None:
                work.expected[shard.uri] = row.output_version
        elif state is State.FAILED:
            work.skipped_failures += 1
        if shard.format == "images":
            if (row is None or row.version is None or row.gone) and last_changed is not None:
                work.moved.append(last_changed)
            if state is not State.NEW:
                has_labels = row is not None and row.output is not None
                last_changed = shard.uri if state is State.CHANGED and has_labels else None
    root = normalised(input_uri)
    gone = [uri for uri, row in known.items() if lies_in(uri, root) and input_format in ("auto", row.format)]
    work.gone = {uri: known.pop(uri) for uri in gone}
    work.states[State.GONE] = len(work.gone)
    work.moved = list(dict.fromkeys(work.moved))
    return work


def _state(shard: Shard, row: Known | None) -> State:
    if row is None or row.version is row.failed_version is None:
        return State.NEW
    if row.version == shard.version:
        return State.DONE
    if row.failed_version != shard.version:
        return State.CHANGED
    # As something else than it was taken for, when `input.format` was another, it may be readable.
    return State.FAILED if row.version is not None or row.format == shard.format else State.NEW
