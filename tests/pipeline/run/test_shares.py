"""Runs of several shares of one dataset: together they do exactly what one run does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.commit import LeaseHeldError
from pipeline.compare import RunPair
from pipeline.config import LABEL_NEW, Selection, Share
from pipeline.report import read_gallery
from pipeline.run import Plan, PreparedRun, RunResult, ShardState, label, plan_run, summaries
from pipeline.storage import ObjectChanged, Storage
from tests.makers import make_image, make_parquet, make_tar
from tests.partitions import manifest_rows
from tests.pipeline import crashing
from tests.pipeline.replaying import Place
from tests.runs import run_config, small_groups


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    small_groups(monkeypatch)


def write_tars(root: str, *numbers: int, count: int = 6) -> None:
    for number in numbers:
        images = [(f"{i}.jpg", make_image(number * 100 + i)) for i in range(count)]
        Storage().write(f"{root}/in/{number:02d}.tar", make_tar(images))


def run(root: str, share: str | None, *fields: str, selection: Selection = LABEL_NEW) -> RunResult:
    return label(run_config(root, f"run.share={share or 'null'}", *fields), selection)


def planned(root: str, share: str, *fields: str) -> list[str]:
    shards = plan_run(run_config(root, f"run.share={share}", *fields)).plan.shards
    return [shard.uri.removeprefix(f"{root}/in/") for shard in shards]


def statistics(root: str) -> bytes:
    [info] = [info for info in Storage().list(f"{root}/out") if info.uri.endswith("class_stats.parquet")]
    return Storage().read(info.uri)


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """Tars, a divided Parquet file and image files."""
    root = str(tmp_path)
    write_tars(root, *range(12))
    parquet = make_parquet({"image": [make_image(i) for i in range(24)]}, row_group_size=2)
    Storage().write(f"{root}/in/x.parquet", parquet)
    for i in range(30):
        Storage().write(f"{root}/in/sub/{i:03d}.jpg", make_image(i))
    return root


def test_shares_are_disjoint_and_complete_and_do_not_divide_files(mixed: str) -> None:
    fields = ["read.split_bytes=8000"]
    everything = planned(mixed, "1/1", *fields)
    assert len([uri for uri in everything if uri.startswith("x.parquet/")]) > 2
    assert len([uri for uri in everything if uri.startswith("sub/") or uri.startswith("images-")]) > 3
    shares = [planned(mixed, f"{i}/4", *fields) for i in range(1, 5)]
    assert sorted(uri for share in shares for uri in share) == sorted(everything)
    for kind in ("x.parquet/", "images-"):
        assert sum(any(uri.startswith(kind) for uri in share) for share in shares) == 1


def test_image_files_are_divided_by_the_uris_of_the_input(tmp_path: Path) -> None:
    root, folders = str(tmp_path), [f"{tmp_path}/in/{letter}" for letter in "abcdefgh"]
    for i, folder in enumerate(folders):
        Storage().write(f"{folder}/{i}.jpg", make_image(i))
    shares = [planned(root, f"{i}/2", f"input.uri={json.dumps(folders)}") for i in (1, 2)]
    assert sum(map(len, shares)) == 8
    assert all(shares)
    assert not all(planned(root, f"{i}/2") for i in (1, 2))


@pytest.mark.parametrize("is_folder_first", [True, False])
def test_image_files_that_another_input_has_labeled_are_labeled_once(
    tmp_path: Path, is_folder_first: bool
) -> None:
    """Groups of the parent folder have images of both shares; groups of subfolders are of both shares."""
    root, place = str(tmp_path), Place(str(tmp_path))
    for i in range(30):
        Storage().write(f"{root}/in/{'abcd'[i % 4]}/{i:03d}.jpg", make_image(i))
    inputs = f"{root}/in", json.dumps([f"{root}/in/{letter}" for letter in "abcd"])
    first, second = (f"input.uri={uri}" for uri in (inputs if is_folder_first else inputs[::-1]))
    run(root, None, first)
    for i in (1, 2):
        run(root, f"{i}/2", second)
        place.labels()  # asserts that no image is labeled twice
    assert sum(map(len, place.labels().values())) == 30
    assert planned(root, "1/1", second) == []


@pytest.fixture
def of_parent(tmp_path: Path) -> tuple[str, str]:
    """Root and input of images in four folders, which are labeled in groups of their parent folder."""
    root = str(tmp_path)
    for i in range(30):
        Storage().write(f"{root}/in/{'abcd'[i % 4]}/{i:03d}.jpg", make_image(i))
    run(root, None)
    return root, f"input.uri={json.dumps([f'{root}/in/{letter}' for letter in 'abcd'])}"


@pytest.mark.parametrize("other", ["1/2", "2/2"])
def test_shares_that_plan_at_once_both_replace_groups_of_another_input(
    of_parent: tuple[str, str], other: str
) -> None:
    """The other share removes the groups, and labels its images, after this one has planned to copy rows."""
    (root, fields), place = of_parent, Place(of_parent[0])
    this = "2/2" if other == "1/2" else "1/2"
    plans = list[Plan]()

    def run_other(prepared: PreparedRun) -> None:
        plans.append(prepared.plan)
        place.run(LABEL_NEW, fields, f"run.share={other}")
        place.labels()  # asserts that no image is labeled twice

    label(run_config(root, fields, f"run.share={this}"), on_plan=run_other)
    assert plans[0].replaced
    assert plans[0].shards
    assert sum(map(len, place.labels().values())) == 30
    assert planned(root, "1/1", fields) == []


def test_run_ends_if_another_run_rewrites_a_group_that_the_input_replaces(of_parent: tuple[str, str]) -> None:
    """A rewritten group stays, so its images must not be labeled in other groups."""
    (root, fields), place, storage = of_parent, Place(of_parent[0]), Storage()

    def rewrite(prepared: PreparedRun) -> None:
        for info in [*prepared.job.partition.prediction_files()]:
            storage.write(info.uri, storage.read(info.uri))

    with pytest.raises(ObjectChanged):
        label(run_config(root, fields), on_plan=rewrite)
    assert sum(map(len, place.labels().values())) == 30
    place.run(LABEL_NEW, fields)
    assert sum(map(len, place.labels().values())) == 30
    assert planned(root, "1/1", fields) == []


def test_groups_that_the_manifest_lacks_are_replaced(of_parent: tuple[str, str]) -> None:
    """As after a run that was killed before it wrote the manifest."""
    (root, fields), place = of_parent, Place(of_parent[0])
    Storage().delete(plan_run(run_config(root)).job.partition.manifest.uri)
    place.run(LABEL_NEW, fields)
    assert sum(map(len, place.labels().values())) == 30


@pytest.mark.parametrize("share", ["1/2", "2/2"])
def test_share_removes_the_rows_of_groups_whose_files_a_dead_share_removed(
    of_parent: tuple[str, str], share: str
) -> None:
    (root, fields), storage = of_parent, Storage()
    partition = plan_run(run_config(root)).job.partition
    groups = {row.uri for row in manifest_rows(partition.manifest)}
    for info in partition.prediction_files():
        storage.delete(info.uri)
    run(root, share, fields)
    assert not groups & {row.uri for row in manifest_rows(partition.manifest)}


def test_shares_end_like_one_run(mixed: str) -> None:
    place, fields = Place(mixed), ("read.split_bytes=8000",)
    place.run(LABEL_NEW, *fields)
    end = place.end_state()
    gallery = read_gallery(Storage(), plan_run(run_config(mixed, *fields)).job.partition.uri)
    place.put("out", {})
    for i in (3, 1, 2):
        place.run(LABEL_NEW, *fields, f"run.share={i}/3")
    assert place.end_state() == end
    assert read_gallery(Storage(), plan_run(run_config(mixed, *fields)).job.partition.uri).equals(gallery)
    assert planned(mixed, "1/1", *fields) == []


@pytest.mark.slow
def test_three_drivers_at_once_write_what_one_driver_writes(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real S3 server, with an update of the manifest after every second shard."""
    place = Place(bucket)
    write_tars(bucket, *range(24))
    for i in range(30):
        Storage().write(f"{bucket}/in/sub/{i:03d}.jpg", make_image(i))
    place.run()
    end = place.end_state()
    gallery = read_gallery(Storage(), plan_run(run_config(bucket)).job.partition.uri)
    place.put("out", {})
    drivers = [crashing.start([*place.fields(), f"run.share={i}/3"], LABEL_NEW) for i in (1, 2, 3)]
    for driver in drivers:
        driver.join(300)
    assert [driver.exitcode for driver in drivers] == [0, 0, 0]
    assert place.end_state() == end
    assert read_gallery(Storage(), plan_run(run_config(bucket)).job.partition.uri).equals(gallery)
    records = [json.loads(data) for name, data in place.objects("out").items() if "/runs/" in name]
    assert sorted(record["config"]["run"]["share"] for record in records) == ["1/3", "2/3", "3/3"]
    whole = plan_run(run_config(bucket)).plan
    assert sum(record["counts"]["shards"] for record in records) == whole.states[ShardState.DONE]


def test_share_without_shards_succeeds_and_reports_it(tmp_path: Path) -> None:
    root = str(tmp_path)
    write_tars(root, 0)
    empty, other = ("1/2", "2/2") if Share(2, 2).contains(f"{root}/in/00.tar") else ("2/2", "1/2")
    result = run(root, empty)
    assert result.plan.describe() == f"share {empty} has no shards: the other shares have them"
    assert (result.is_complete, result.totals.shards) == (True, 0)
    assert run(root, other).plan.describe() == f"1 shard in share {other}: 1 new; 1 to label"
    assert run(root, empty).is_complete
    assert run(root, None).totals.shards == 0


def test_deleted_shards_are_pruned_by_their_share_alone(tmp_path: Path) -> None:
    root = str(tmp_path)
    write_tars(root, *range(8))
    run(root, None)
    for i in range(8):
        (tmp_path / "in" / f"{i:02d}.tar").unlink()
    write_tars(root, 9)
    uris = [f"{root}/in/{i:02d}.tar" for i in range(8)]
    own = {uri for uri in uris if Share(1, 2).contains(uri)}
    assert 0 < len(own) < 8
    result = run(root, "1/2", selection=Selection(prune=True))
    assert result.plan.to_prune == own
    rows = {row.uri: row.deleted for row in manifest_rows(result.partition.manifest)}
    assert {uri: rows.get(uri) for uri in uris} == {uri: None if uri in own else False for uri in uris}


def test_share_is_refused_while_an_overlapping_share_is_labeled(tmp_path: Path) -> None:
    root, errors, labeled = str(tmp_path), list[str](), list[str]()
    write_tars(root, *range(8))

    def others(*_: Any) -> None:
        for share in (None, "1/3", "2/2"):
            if share in labeled:
                continue
            try:
                run(root, share)
                labeled.append(str(share))
            except LeaseHeldError as error:
                errors.append(str(error))

    label(run_config(root, "run.share=1/2"), on_progress=others)
    assert labeled == ["2/2"]
    assert all("lease-1-of-2.json" in error for error in errors)
    assert planned(root, "1/1") == []


@pytest.mark.parametrize("moment", ["before the statistics", "before the report"])
def test_statistics_and_report_are_complete_after_simultaneous_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The other share ends while this one writes its summaries."""
    root, place = str(tmp_path), Place(str(tmp_path))
    write_tars(root, *range(8))
    place.run()
    end = place.end_state()
    place.put("out", {})
    name = "write_class_table" if moment == "before the statistics" else "render_report"
    function, calls = getattr(summaries, name), list[str]()

    def interleaved(*arguments: Any) -> Any:
        calls.append(name)
        if moment == "before the statistics":
            partition, fold, topk = arguments

            def late_fold() -> Any:
                found = fold()
                if len(calls) == 1:
                    calls.append("other")
                    place.run(LABEL_NEW, "run.share=2/2")
                return found

            return function(partition, late_fold, topk)
        page = function(*arguments)
        if len(calls) == 1:
            place.run(LABEL_NEW, "run.share=2/2")
        return page

    monkeypatch.setattr(summaries, name, interleaved)
    place.run(LABEL_NEW, "run.share=1/2")
    assert place.end_state() == end
    [page] = [data for path, data in place.objects("out").items() if path.endswith("report.html")]
    assert b"48" in page


def test_drift_is_compared_with_the_same_share(tmp_path: Path) -> None:
    root = str(tmp_path)
    write_tars(root, *range(8))
    first = [run(root, f"{i}/2") for i in (1, 2)]
    write_tars(root, *range(8, 16))
    for result, i in zip(first, (1, 2), strict=True):
        again = run(root, f"{i}/2", "gate.max_psi=1000")
        assert again.statistics is not None
        found = RunPair.find(again.partition, None, again.run)
        assert (found.previous, list(found.current)) == (result.run, [again.run])
