from __future__ import annotations

from pipeline.commit import Known
from pipeline.config import LABEL_NEW, Selection
from pipeline.read import Shard
from pipeline.run import State, Work, compare

ROOT = "s3://b/in"


def shard(name: str, version: str = "v1", format: str = "webdataset") -> Shard:
    return Shard(f"{ROOT}/{name}", version, format, 10)  # type: ignore[arg-type]


def known(version: str | None = "v1", **fields: object) -> Known:
    labelled = {"output": "predictions/x.parquet", "output_version": "etag"} if version else {}
    values: dict[str, object] = {
        "errors": 0,
        "error": None,
        "failed_version": None,
        "gone": False,
        "format": "webdataset",
    }
    values |= {"version": version, "output": None, "output_version": None, "format": "webdataset"}
    values |= labelled | fields
    return Known(**values)  # type: ignore[arg-type]


def plan(
    listing: list[Shard], rows: dict[str, Known], selection: Selection = LABEL_NEW, uri: str = ROOT
) -> Work:
    return compare(listing, {f"{ROOT}/{name}": row for name, row in rows.items()}, uri, selection)


def names(work: Work) -> list[str]:
    return [s.uri.removeprefix(f"{ROOT}/") for s in work.shards]


LISTING = [shard("done"), shard("changed", "v2"), shard("new"), shard("failed"), shard("errors")]
ROWS = {
    "done": known(),
    "changed": known(),
    "failed": known(None, error="cut", failed_version="v1"),
    "errors": known(errors=3),
    "gone": known(),
}


def test_only_what_is_new_or_has_changed_is_labelled() -> None:
    work = plan(LISTING, ROWS)
    assert names(work) == ["changed", "new"]
    assert work.expected == {f"{ROOT}/changed": "etag"}
    assert work.states == {State.NEW: 1, State.CHANGED: 1, State.DONE: 2, State.FAILED: 1, State.GONE: 1}
    assert list(work.gone) == [f"{ROOT}/gone"]
    assert (work.again, work.skipped_failures) == (0, 1)
    assert work.to_prune == set()
    assert plan(LISTING, ROWS, Selection(prune=True)).to_prune == {f"{ROOT}/gone"}


def test_errors_are_tried_again_if_wanted() -> None:
    work = plan(LISTING, ROWS, Selection(retry_errors=True))
    assert names(work) == ["changed", "new", "failed", "errors"]
    assert (work.again, work.skipped_failures) == (2, 0)
    assert work.expected.keys() == {f"{ROOT}/changed", f"{ROOT}/errors"}


def test_everything_is_labelled_anew_if_wanted() -> None:
    work = plan(LISTING, ROWS, Selection(relabel=True))
    assert work.shards == LISTING
    assert work.again == 3


def test_a_labelled_shard_that_could_not_be_read_again_is_tried_again_if_wanted() -> None:
    rows = {"x": known(error="cut", failed_version="v1")}
    assert names(plan([shard("x")], rows)) == []
    assert names(plan([shard("x")], rows, Selection(retry_errors=True))) == ["x"]


def test_a_group_that_has_lost_images_to_one_that_returns_is_told() -> None:
    rows = {"a": known(format="images"), "b": known(gone=True, format="images")}
    work = plan([shard("a", "v2", "images"), shard("b", "v2", "images")], rows)
    assert work.moved == [f"{ROOT}/a"]


def test_a_shard_that_storage_kept_from_being_read_is_tried_again() -> None:
    work = plan([shard("x")], {"x": known(None, error="503")})
    assert names(work) == ["x"]
    assert work.states[State.NEW] == 1


def test_a_failed_shard_that_changes_is_tried_again() -> None:
    assert names(plan([shard("failed", "v2")], ROWS)) == ["failed"]


def test_a_labelled_shard_whose_new_version_could_not_be_read_waits_for_another_one() -> None:
    rows = {"x": known("v1", failed_version="v2")}
    assert names(plan([shard("x", "v2")], rows)) == []
    assert names(plan([shard("x", "v3")], rows)) == ["x"]
    assert plan([shard("x", "v1")], rows).states[State.DONE] == 1


def test_a_failed_shard_that_is_read_as_another_format_is_tried_again() -> None:
    rows = {"x": known(None, error="no Parquet file", failed_version="v1", format="parquet")}
    assert names(plan([shard("x", format="webdataset")], rows)) == ["x"]
    assert names(plan([shard("x", format="parquet")], rows)) == []


def test_a_shard_that_is_again_what_is_labelled_is_cured_of_a_failure_between() -> None:
    rows = {"x": known("v1", error="cut", failed_version="v2")}
    assert plan([shard("x", "v1")], rows).cured == [f"{ROOT}/x"]
    assert plan([shard("x", "v2")], rows).cured == []
    assert names(plan([shard("x", "v1")], rows, Selection(retry_errors=True))) == []


def test_shards_of_another_input_are_not_gone() -> None:
    rows = {"../other/x": known(), "../in-2/x": known()}
    work = compare([shard("a")], {f"s3://b/{name[3:]}": row for name, row in rows.items()}, ROOT, LABEL_NEW)
    assert work.gone == {}


def test_only_shards_of_the_format_that_was_looked_for_can_be_gone() -> None:
    rows = {f"{ROOT}/x.tar": known(), f"{ROOT}/images-1": known(format="images")}
    assert list(compare([], dict(rows), ROOT, LABEL_NEW, "images").gone) == [f"{ROOT}/images-1"]
    assert len(compare([], dict(rows), ROOT, LABEL_NEW, "auto").gone) == 2


def test_an_input_that_is_one_object_is_found_and_is_gone() -> None:
    rows = {"x.tar": known()}
    assert plan([shard("x.tar")], rows, uri=f"{ROOT}/x.tar").states[State.DONE] == 1
    assert list(plan([], rows, uri=f"{ROOT}/x.tar").gone) == [f"{ROOT}/x.tar"]


def test_a_shard_that_is_there_again_is_done_and_no_longer_gone() -> None:
    work = plan([shard("x")], {"x": known(gone=True)})
    assert work.returned == [f"{ROOT}/x"]
    assert (work.states[State.DONE], work.gone) == (1, {})


def test_a_group_that_has_lost_images_to_a_new_group_is_told() -> None:
    def group(name: str, version: str = "v1") -> Shard:
        return shard(name, version, "images")

    rows = {name: known(format="images") for name in ("a", "b", "c", "d")}
    listing = [group("a", "v2"), group("new1"), group("new2"), group("b"), group("new3"), group("c", "v2")]
    work = plan([*listing, group("d", "v2")], rows)
    assert work.moved == [f"{ROOT}/a"]
