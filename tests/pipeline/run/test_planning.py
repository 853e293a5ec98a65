from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import pytest

from pipeline.commit import ManifestRow
from pipeline.config import LABEL_NEW, Selection
from pipeline.read import IgnoreReason, ShardListing
from pipeline.run import Plan, ShardState
from pipeline.run.copied_rows import find_regrouped
from pipeline.run.planning import plan
from pipeline.storage import ObjectInfo

ROOT = "s3://b/in"
LABELED = {"output": "predictions/x.parquet", "output_version": "etag", "errors": 0}


def listing(objects: Mapping[str, str], format: Any = None) -> ShardListing:
    """A listing of objects with these versions."""
    infos = (ObjectInfo(f"{ROOT}/{name}", 10, version) for name, version in sorted(objects.items()))
    return ShardListing(infos, ROOT, format)


def row(name: str, version: str | None = "v1", **fields: Any) -> ManifestRow:
    labeled = LABELED if version else {}
    values = {"version": version, "format": "webdataset"} | labeled | fields
    return ManifestRow(f"{ROOT}/{name}", **values)


def manifest(*rows: ManifestRow) -> Mapping[str, ManifestRow]:
    return MappingProxyType({each.uri: each for each in rows})


def names(uris: Any) -> list[str]:
    return [str(getattr(each, "uri", each)).removeprefix(f"{ROOT}/") for each in uris]


FAILED = row("a.tar", None, error="cut", failed_version="v1")
REPROCESSED = {"reprocessed": True}
FAILED_LATER = row("a.tar", error="cut", failed_version="v2")


@dataclass(frozen=True)
class Case:
    """One shard `a.tar`, its manifest row, and the expected plan."""

    listed: str | None  # version
    known: ManifestRow | None
    state: ShardState
    labels: bool
    selection: Selection = LABEL_NEW
    expected: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "new": Case("v1", None, ShardState.NEW, True),
    "done": Case("v1", row("a.tar"), ShardState.DONE, False),
    "changed": Case("v2", row("a.tar"), ShardState.CHANGED, True),
    "done, relabel": Case("v1", row("a.tar"), ShardState.DONE, True, Selection(relabel=True), REPROCESSED),
    "done, retry without errors": Case(
        "v1", row("a.tar"), ShardState.DONE, False, Selection(retry_errors=True)
    ),
    "error rows": Case("v1", row("a.tar", errors=3), ShardState.DONE, False),
    "error rows, retry": Case(
        "v1",
        row("a.tar", errors=3),
        ShardState.DONE,
        True,
        Selection(retry_errors=True),
        REPROCESSED,
    ),
    "unreadable": Case("v1", FAILED, ShardState.FAILED, False, expected={"skipped": [FAILED]}),
    "unreadable, retry": Case(
        "v1", FAILED, ShardState.FAILED, True, Selection(retry_errors=True), REPROCESSED
    ),
    "unreadable, changed since": Case("v2", FAILED, ShardState.CHANGED, True),
    "unreadable because of the storage": Case("v1", row("a.tar", None, error="cut"), ShardState.NEW, True),
    "unreadable as another format": Case("v1", replace(FAILED, format="parquet"), ShardState.NEW, True),
    "labeled, unreadable since": Case(
        "v2", FAILED_LATER, ShardState.FAILED, False, expected={"skipped": [FAILED_LATER]}
    ),
    "labeled, unreadable, then recovered": Case(
        "v1", FAILED_LATER, ShardState.DONE, False, expected={"updated": {f"{ROOT}/a.tar": row("a.tar")}}
    ),
    "labeled, unreadable again": Case(
        "v1", row("a.tar", error="cut", failed_version="v1"), ShardState.DONE, False
    ),
    "deleted": Case(None, row("a.tar"), ShardState.DELETED, False),
    "deleted, then reappeared": Case(
        "v1",
        row("a.tar", deleted=True),
        ShardState.DONE,
        False,
        expected={"updated": {f"{ROOT}/a.tar": row("a.tar")}},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_manifest_row_determines_the_plan_of_a_shard(case: Case) -> None:
    known = manifest(*[case.known] * (case.known is not None))
    objects = {} if case.listed is None else {"a.tar": case.listed}
    found = plan(listing(objects), known, case.selection)
    assert {state for state, count in found.states.items() if count} == {case.state}
    assert names(found.shards) == ["a.tar"] * case.labels
    defaults = {"skipped": [], "updated": {}}
    values = {name: getattr(found, name) for name in defaults}
    values["reprocessed"] = "; 1 to label (1 reprocessed)" in found.describe()
    assert values == {"reprocessed": False} | defaults | dict(case.expected)
    assert names(found.deleted) == ["a.tar"] * (case.state is ShardState.DELETED)


def test_deleted_shards_are_pruned_only_if_selected() -> None:
    known = manifest(row("a.tar"), row("b.tar"), row("c.tar", None, error="cut", failed_version="v1"))
    kept = plan(listing({"a.tar": "v1"}), known, LABEL_NEW)
    pruned = plan(listing({"a.tar": "v1"}), known, Selection(prune=True))
    assert names(kept.deleted) == ["b.tar", "c.tar"]
    assert kept.to_prune == set()
    assert pruned.to_prune == {f"{ROOT}/b.tar"}


def test_only_shards_of_the_listed_input_and_format_can_be_deleted() -> None:
    elsewhere = ManifestRow("s3://b/in2/x.tar", "v1", "webdataset", **LABELED)
    known = manifest(elsewhere, row("y.parquet", format="parquet"), row("z.tar"))
    assert names(plan(listing({}, "webdataset"), known, LABEL_NEW).deleted) == ["z.tar"]
    assert names(plan(listing({}), known, LABEL_NEW).deleted) == ["y.parquet", "z.tar"]


def test_ignored_objects_are_counted_by_reason() -> None:
    found = plan(listing({"a.tar": "v1", "README.md": "v1", "_SUCCESS": "v1"}), {}, LABEL_NEW)
    assert (names(found.shards), found.listing.ignored) == (
        ["a.tar"],
        {IgnoreReason.HIDDEN: 1, IgnoreReason.FORMAT: 1},
    )


IMAGES = {f"{i:05d}.jpg": "v1" for i in range(4000)}


def labeled_groups(objects: Mapping[str, str]) -> Mapping[str, ManifestRow]:
    shards = list(listing(objects))
    return manifest(*(row(names([s])[0], s.version, format="images") for s in shards))


def test_images_to_label_are_counted_for_image_files_only() -> None:
    assert plan(listing(IMAGES), {}, LABEL_NEW).images == 4000
    assert plan(listing({**IMAGES, "a.tar": "v1"}), {}, LABEL_NEW).images is None


def test_counts_are_in_images_for_image_files_only() -> None:
    known = labeled_groups(IMAGES)
    changed, *others = listing(IMAGES)
    objects = {name: "v1" for shard in others for name in names(shard.members)}
    objects |= dict.fromkeys(names(changed.members), "v2")
    done = sum(len(shard.members) for shard in others)
    found = plan(listing(objects), known, LABEL_NEW).describe()
    states = f"4,000 images: {len(changed.members):,} changed, {done:,} done; "
    assert found == f"{states}{len(changed.members):,} to label"
    relabeled = plan(listing(objects), known, Selection(relabel=True)).describe()
    assert relabeled == f"{states}4,000 to label ({done:,} reprocessed)"
    mixed = plan(listing({**objects, "a.tar": "v1"}), known, LABEL_NEW).describe()
    assert mixed == f"{len(known) + 1} shards: 1 new, 1 changed, {len(others)} done; 2 to label"


def test_deleted_images_are_counted_from_the_manifest() -> None:
    deleted = row("images-0000000000000000", format="images", rows=7)
    found = plan(listing({}), manifest(deleted), Selection(prune=True))
    assert found.describe() == "7 images: 7 deleted; 0 to label, 7 to prune"


def cutting_image() -> str:
    """An image that starts a group; without the image, the group joins the preceding group."""
    return names([list(listing(IMAGES))[2].members[0]])[0]


def test_removed_image_can_move_its_group_to_the_preceding_group() -> None:
    known, cut = labeled_groups(IMAGES), cutting_image()
    found = plan(listing({name: v for name, v in IMAGES.items() if name != cut}), known, LABEL_NEW)
    assert found.states[ShardState.DELETED] == 1
    [merged] = found.shards
    [deleted] = found.deleted
    group_of = {member.uri: shard.uri for shard in listing(IMAGES) for member in shard.members}
    from_deleted = {uri: group for uri, group in group_of.items() if group == deleted}
    assert find_regrouped(found.shards, from_deleted) == {deleted}
    assert merged.uri in known


def test_added_image_can_split_its_group() -> None:
    cut = cutting_image()
    before = labeled_groups({name: v for name, v in IMAGES.items() if name != cut})
    found: Plan = plan(listing(IMAGES), before, LABEL_NEW)
    changed = [s.uri for s in found.shards if s.uri in before]
    assert found.replaced == set(changed)
    assert len(found.shards) == 2


def test_unchanged_groups_are_not_regrouped() -> None:
    shards = list(listing(IMAGES))
    group_of = {member.uri: shard.uri for shard in shards for member in shard.members}
    assert find_regrouped(shards, group_of) == set()
