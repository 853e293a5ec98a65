"""Consumer tables of real labels, in a folder and a bucket, as Parquet and as Delta Lake."""

from __future__ import annotations

import io
import json
import shutil
import signal
import tarfile
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Selection
from pipeline.publish import TableBusyError, publishing
from pipeline.storage import ObjectChanged, Storage, StorageError
from tests.makers import make_tar
from tests.pipeline.crashing import Crash, Moment, leave_out_ray
from tests.pipeline.publish.publishing_runs import DELTA, NEEDS_DELTALAKE, PARQUET, Format, Place

SAMPLE = Path(__file__).parents[3] / "jobs" / "data" / "fashion-mnist" / "test-0000.tar"
Members = list[tuple[str, bytes]]
#: Rows of about two of the small shards: so a table has several files, and each one a few shards.
SMALL_FILES = 4000


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_ray(monkeypatch)


@pytest.fixture(scope="module")
def members() -> Members:
    """Images and labels of a tar, 100 samples; one that is no image, and keys that are meant to do harm."""
    with tarfile.open(SAMPLE) as tar:
        found = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()[:200]]  # type: ignore[union-attr]
    for number, key in {3: "../../x", 7: "it's", 11: '"; DROP TABLE t; --', 15: "' OR 1=1 --"}.items():
        (image, png), (_, label) = found[2 * number : 2 * number + 2]
        found[2 * number : 2 * number + 2] = [(f"{key}.png", png), (f"{key}.cls", label)]
        assert image.endswith(".png")
    found[10] = (found[10][0], b"no image")
    return found


def first_day(members: Members) -> dict[str, bytes]:
    return {
        "a.tar": make_tar(members[:40]),
        "b'; --.tar": make_tar(members[40:60]),
        "c=d/e.tar": make_tar(members[60:100]),
        "f.tar": make_tar(members[100:120]),
    }


@pytest.fixture(params=[PARQUET, DELTA])
def format(request: pytest.FixtureRequest) -> Format:
    return request.param


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, format: Format) -> Place:
    if request.param == "folder":
        return Place(str(request.getfixturevalue("tmp_path")), format)
    return Place(str(request.getfixturevalue("bucket")), format)


@pytest.fixture
def local(tmp_path: Path, format: Format) -> Place:
    return Place(str(tmp_path), format)


@pytest.fixture
def in_delta(tmp_path: Path) -> Place:
    pytest.importorskip("deltalake", reason=NEEDS_DELTALAKE.kwargs["reason"])
    return Place(str(tmp_path), "delta")


def test_every_version_holds_what_the_prediction_files_hold_when_it_is_made(
    place: Place, members: Members
) -> None:
    """First all, then nothing new, an increment, a changed shard, a pruned one."""
    place.put(first_day(members))
    place.label()
    history = {1: place.predictions()}
    assert len(history[1]) == 60
    done = place.publish(file_bytes=SMALL_FILES)
    assert (done.snapshot.version, done.is_new) == (1, True)
    assert len(done.snapshot.files) > 2
    assert place.published() == history[1]

    before = place.objects("table")
    assert not place.publish(file_bytes=SMALL_FILES).is_new
    assert place.objects("table") == before

    place.put({"new.tar": make_tar(members[120:160])})
    place.label()
    history[2] = place.predictions()
    done = place.publish(file_bytes=SMALL_FILES)
    assert done.increment.added["uri"].to_pylist() == [place.shard_uri("new.tar")]
    assert not len(done.increment.replaced)
    assert place.published() == history[2]

    place.put({"b'; --.tar": make_tar(members[160:200])}, remove=("f.tar",))
    place.label(Selection(prune=True))
    history[3] = place.predictions()
    done = place.publish(file_bytes=SMALL_FILES)
    assert done.increment.replaced.to_pylist() == [place.shard_uri("b'; --.tar")]
    assert done.increment.removed.to_pylist() == [place.shard_uri("f.tar")]
    assert place.published() == history[3]

    assert history[1] != history[2] != history[3]
    for version, rows in history.items():
        assert place.published(version) == rows
    keys = {row["key"] for row in history[3]}
    assert {"../../x", "it's", '"; DROP TABLE t; --', "' OR 1=1 --"} <= keys
    errors = [row for row in history[3] if row["error"] is not None]
    assert len(errors) == 1


def test_an_increment_leaves_large_files_as_they_are_and_takes_small_ones_in(
    local: Place, members: Members
) -> None:
    local.put(first_day(members))
    local.label()
    first = local.publish(file_bytes=SMALL_FILES).snapshot
    local.put({"new.tar": make_tar(members[120:124])})
    local.label()
    second = local.publish(file_bytes=SMALL_FILES).snapshot
    assert set(first.files) < set(second.files)  # their bytes are many, by that measure
    local.put({"newer.tar": make_tar(members[124:128])})
    local.label()
    third = local.publish().snapshot  # by this, they are all small
    assert len(third.files) == 1
    assert local.published() == local.predictions()


def test_rows_tell_which_version_brought_them(local: Place, members: Members) -> None:
    local.put(first_day(members))
    local.label()
    local.publish()
    local.put({"a.tar": make_tar(members[120:130]), "new.tar": make_tar(members[120:160])})
    local.label()
    local.publish()
    [table] = local._parquet(None) if local.format == "parquet" else local._delta(None)
    new = [row["shard"] for row in table.to_pylist() if row["published"] > 1]
    assert Counter(new) == {local.shard_uri("a.tar"): 5, local.shard_uri("new.tar"): 20}
    assert table.num_rows == 40 + 5 + 20


def test_rows_lie_by_label_and_then_by_score_so_that_row_groups_tell_what_they_hold(
    local: Place, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "ROW_GROUP_ROWS", 10)
    local.put(first_day(members))
    local.label()
    [file] = local.publish().snapshot.files
    data = local.storage.read(f"{local.table().uri}/{file.path}")
    table = pq.read_table(io.BytesIO(data))
    pairs = list(zip(table["label"].to_pylist(), table["score"].to_pylist(), strict=True))
    assert pairs[-1] == (None, None)  # the image that is none
    assert pairs[:-1] == sorted(pairs[:-1])
    groups = pq.ParquetFile(io.BytesIO(data)).metadata
    assert groups.num_row_groups == 6
    ranges = [groups.row_group(i).column(3).statistics for i in range(6)]
    label = pairs[0][0]
    with_label = [r for r in ranges if r.min <= label <= r.max]
    assert 1 <= len(with_label) < 3
    assert groups.row_group(0).column(5).has_column_index


def test_embeddings_can_be_left_out_and_put_back(tmp_path: Path, format: Format, members: Members) -> None:
    place = Place(str(tmp_path), format, "output.embedding=float16")
    place.put(first_day(members))
    place.label()

    def embeddings() -> list[Any]:
        tables = place._parquet(None) if format == "parquet" else place._delta(None)
        rows = [row for table in tables for row in table.to_pylist()]
        assert len(rows) == 60
        rows.sort(key=lambda row: (row["shard"], row["index"]))
        return [row.get("embedding") for row in rows]

    assert place.publish(embedding=False).snapshot.version == 1
    assert embeddings() == [None] * 60
    assert place.publish(embedding=True).snapshot.version == 2
    uris = sorted(uri for uri in place.objects("out") if "/predictions/" in uri)
    truth = pa.concat_tables(pq.read_table(io.BytesIO(place.storage.read(uri))) for uri in uris)
    truth = truth.sort_by([("shard", "ascending"), ("index", "ascending")])
    assert embeddings() == truth["embedding"].to_pylist()
    assert not place.publish(embedding=True).is_new


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_publication_that_dies_at_any_write_leaves_a_whole_version_and_the_next_one_does_the_rest(
    local: Place, members: Members, moment: Moment
) -> None:
    local.put(first_day(members))
    local.label()
    local.publish(file_bytes=SMALL_FILES)
    old = local.predictions()
    table, kept = Path(local.root, "table"), Path(local.root, "kept")
    table.rename(kept)
    local.put({"a.tar": make_tar(members[20:40]), "new.tar": make_tar(members[120:140])}, remove=("f.tar",))
    local.label(Selection(prune=True))
    new = local.predictions()
    for number in count(1):
        shutil.rmtree(table, ignore_errors=True)
        shutil.copytree(kept, table)
        died = local.dies_publishing(Crash(number, moment), SMALL_FILES)
        assert local.published() in (old, new)
        assert local.published() == new or died
        local.publish(file_bytes=SMALL_FILES)
        assert local.published() == new
        _assert_no_leftovers(local)
        if not died:
            assert number > 4
            return


def _assert_no_leftovers(place: Place) -> None:
    """Only what the current version and the kept ones name is there."""
    if place.format == "delta":
        states = [uri for uri in place.objects("table") if "/_cvt_label/" in uri]
        assert len(states) == 1
        return
    root = f"{place.root}/table/model={place.partition.model}"
    versions = [place.content()]
    versions += [json.loads(place.storage.read(f"{root}/{kept['path']}")) for kept in versions[0]["kept"]]
    named = {f"{root}/current.json"}
    for content in versions:
        named |= {f"{root}/{file['path']}" for file in content["files"]}
        named |= {f"{root}/{content['shards']}", f"{root}/{content['shards'][:-8]}.json"}
    assert set(place.objects("table")) == named


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_first_publication_that_dies_leaves_no_table_or_a_whole_one(
    local: Place, members: Members, number: int
) -> None:
    local.put(first_day(members))
    local.label()
    local.dies_publishing(Crash(number, "after"))
    assert local.published() in ([], local.predictions())
    local.publish()
    assert local.published() == local.predictions()
    _assert_no_leftovers(local)


def test_of_publishers_at_once_none_adds_what_another_has_added(place: Place, members: Members) -> None:
    place.put(first_day(members))
    place.label()
    children = [place.start_publishing() for _ in range(2)]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert place.published() == place.predictions()
    assert not place.publish().is_new
    _assert_no_leftovers(place)


def test_a_publisher_that_was_overtaken_begins_anew_from_what_the_other_has_published(
    local: Place, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one publishes, of a change, just before this one's commit."""
    local.put(first_day(members))
    local.label()
    slow = local.table()
    commit = slow.commit
    overtakings = iter([True])

    def overtaken(*arguments: Any) -> None:
        if next(overtakings, False):
            local.put({"new.tar": make_tar(members[120:160])})
            local.label()
            assert local.publish().is_new
        commit(*arguments)

    monkeypatch.setattr(slow, "commit", overtaken)
    done = publishing.publish(local.partition, slow)
    assert not done.is_new
    assert done.snapshot.version == 1
    assert local.published() == local.predictions()
    _assert_no_leftovers(local)


def test_a_publisher_that_is_always_overtaken_gives_up_and_says_so(
    local: Place, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.put(first_day(members))
    local.label()
    slow = local.table()
    commit, turn = slow.commit, count(1)
    monkeypatch.setattr(publishing, "_ATTEMPTS", 2)

    def overtaken(*arguments: Any) -> None:
        begin = next(turn)
        local.put({"new.tar": make_tar(members[2 * begin : 2 * begin + 4])})
        local.label()
        assert local.publish().is_new
        local.put({"new.tar": make_tar(members[2 * begin : 2 * begin + 6])})
        local.label()
        commit(*arguments)

    monkeypatch.setattr(slow, "commit", overtaken)
    with pytest.raises(TableBusyError, match="faster 2 times"):
        publishing.publish(local.partition, slow)


def test_a_commit_whose_answer_was_lost_counts(
    local: Place, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done, and then seems to have failed, since it was tried again."""
    local.put(first_day(members))
    local.label()
    local.publish()
    local.put({"new.tar": make_tar(members[120:160])})
    local.label()
    owner: Any = Storage
    name, failure = "write", Exception()
    if local.format == "parquet":
        failure = ObjectChanged("current.json", "not as expected")
    else:
        import deltalake
        from deltalake.exceptions import CommitFailedError

        owner, name, failure = deltalake.DeltaTable, "create_write_transaction", CommitFailedError("0")
    action = getattr(owner, name)

    def loses(self: Any, *arguments: Any, **options: Any) -> Any:
        done = action(self, *arguments, **options)
        if name != "write" or str(arguments[0]).endswith("/current.json"):
            raise failure
        return done

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, loses)
        assert local.publish().snapshot.version == 2
    assert local.published() == local.predictions()
    assert not local.publish().is_new
    _assert_no_leftovers(local)


def test_labels_that_the_manifest_does_not_know_yet_stay_as_they_were_published(
    local: Place, members: Members
) -> None:
    """As when a run is at work, or has died: the manifest follows the files."""
    local.put(first_day(members))
    local.label()
    local.publish()
    old = local.published()
    manifest = local.storage.read(f"{local.partition.uri}/manifest.parquet")
    local.put({"a.tar": make_tar(members[120:160]), "new.tar": make_tar(members[160:200])})
    local.label()
    newer = local.storage.read(f"{local.partition.uri}/manifest.parquet")
    local.storage.write(f"{local.partition.uri}/manifest.parquet", manifest)
    done = local.publish()
    assert not done.is_new
    assert local.published() == old
    table = pq.read_table(io.BytesIO(manifest))
    rows = [
        row | {"output_version": "0-0"} if row["uri"].endswith("a.tar") else row for row in table.to_pylist()
    ]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, table.schema), out)
    local.storage.write(f"{local.partition.uri}/manifest.parquet", out.getvalue())
    done = local.publish()
    assert done.increment.pending.to_pylist() == [local.shard_uri("a.tar")]
    assert local.published() == old
    local.storage.write(f"{local.partition.uri}/manifest.parquet", newer)
    local.publish()
    assert local.published() == local.predictions()


def test_a_table_of_which_every_shard_is_gone_is_empty_and_can_be_read(
    local: Place, members: Members
) -> None:
    local.put({"a.tar": make_tar(members[:20]), "b.tar": make_tar(members[20:30])})
    local.label()
    local.publish()
    local.partition.manifest.update({}, removed=[local.shard_uri("a.tar"), local.shard_uri("b.tar")])
    assert local.publish().is_new
    assert local.published() == []
    tables = local._parquet(None) if local.format == "parquet" else local._delta(None)
    assert "label" in tables[0].column_names


def test_two_models_are_published_side_by_side(tmp_path: Path, format: Format, members: Members) -> None:
    one, two = Place(str(tmp_path), format), Place(str(tmp_path), format, "output.topk=3")
    one.put(first_day(members))
    one.label()
    two.label()
    assert one.publish().snapshot.version == 1
    assert two.publish().snapshot.version == 1
    assert not one.publish().is_new
    assert not two.publish().is_new
    if format == "delta":
        table = one.delta().to_pyarrow_table()
        assert Counter(table["model"].to_pylist()) == {one.partition.model: 60, two.partition.model: 60}
        assert one.delta().transaction_version(f"cvt-label/model={one.partition.model}") is not None
    else:
        assert len([u for u in one.objects("table") if u.endswith("current.json")]) == 2


def test_versions_beyond_those_that_are_kept_are_removed(tmp_path: Path, members: Members) -> None:
    place = Place(str(tmp_path))
    for number in range(5):
        place.put({"a.tar": make_tar(members[2 * number : 20])})
        place.label()
        place.publish(keep=3)
        _assert_no_leftovers(place)
    content = place.content()
    assert content["version"] == 5
    assert [kept["version"] for kept in content["kept"]] == [4, 3]
    for version, rows in {5: 6, 4: 7, 3: 8}.items():
        assert len(place.published(version)) == rows
    place.put({"a.tar": make_tar(members[:20])})
    place.label()
    place.publish(keep=1)
    assert place.content()["kept"] == []
    assert len(place.published()) == 10


def test_what_is_no_pointer_is_named(tmp_path: Path, members: Members) -> None:
    place = Place(str(tmp_path))
    place.put({"a.tar": make_tar(members[:20])})
    place.label()
    place.storage.write(f"{place.table().uri}/current.json", b"{}")
    with pytest.raises(StorageError, match=r"current\.json: not a version of a table"):
        place.publish()


def test_an_increment_is_one_commit_with_the_transaction_of_the_application(
    in_delta: Place, members: Members
) -> None:
    in_delta.put(first_day(members))
    in_delta.label()
    first = in_delta.publish()
    in_delta.put({"a.tar": make_tar(members[120:160])}, remove=("f.tar",))
    in_delta.label(Selection(prune=True))
    second = in_delta.publish()
    assert in_delta.delta().version() == 1
    app = f"cvt-label/model={in_delta.partition.model}"
    for version, done in enumerate([first, second]):
        number = in_delta.delta(version).transaction_version(app)
        assert number >> 32 == done.snapshot.version
    commits = sorted(Path(in_delta.root, "table", "_delta_log").glob("*.json"))
    actions = [json.loads(line) for line in commits[1].read_text().splitlines()]
    assert Counter(next(iter(action)) for action in actions) == {
        "commitInfo": 1,
        "add": 1,
        "remove": 1,
        "txn": 1,
    }


def test_the_log_tells_readers_which_files_can_be_skipped(in_delta: Place, members: Members) -> None:
    in_delta.put(first_day(members))
    in_delta.label()
    in_delta.publish()
    actions = pa.table(in_delta.delta().get_add_actions(flatten=True))
    labels = [row["label"] for row in in_delta.predictions() if row["label"] is not None]
    assert actions["min.label"].to_pylist() == [min(labels)]
    assert actions["max.label"].to_pylist() == [max(labels)]
    assert actions["null_count.label"].to_pylist() == [1]
    assert actions["num_records"].to_pylist() == [60]


def test_models_that_are_published_at_once_do_not_hinder_one_another(
    in_delta: Place, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model's first publication, and then its second, just before the commits of the one."""
    other = Place(in_delta.root, "delta", "output.topk=3")
    for day in (first_day(members), {"a.tar": make_tar(members[120:140])}):
        in_delta.put(day)
        in_delta.label()
        other.label()
        table = in_delta.table()
        commit, written = table.commit, len(data_files(in_delta))

        def overtaken(*arguments: Any, commit: Any = commit) -> None:
            assert other.publish().is_new
            commit(*arguments)

        monkeypatch.setattr(table, "commit", overtaken)
        assert publishing.publish(in_delta.partition, table).is_new
        assert len(data_files(in_delta)) == written + 2  # nothing was written twice
    found = in_delta.delta().to_pyarrow_table()
    assert Counter(found["model"].to_pylist()) == {p.partition.model: 50 for p in (in_delta, other)}


def data_files(place: Place) -> list[str]:
    """The data files that are there, in a version or not."""
    return [uri for uri in place.objects("table") if "/table/model=" in uri]


def test_a_list_of_shards_that_is_lost_costs_a_publication_of_all_and_no_more(
    in_delta: Place, members: Members
) -> None:
    in_delta.put(first_day(members))
    in_delta.label()
    in_delta.publish()
    [state] = [uri for uri in in_delta.objects("table") if "/_cvt_label/" in uri]
    in_delta.storage.delete(state)
    assert in_delta.publish().is_new
    assert in_delta.published() == in_delta.predictions()


def test_a_table_that_its_owner_has_compacted_goes_on(in_delta: Place, members: Members) -> None:
    """And so does one that was vacuumed, and whose rows were put into another order."""
    in_delta.put(first_day(members))
    in_delta.label()
    in_delta.publish(file_bytes=SMALL_FILES)
    in_delta.delta().optimize.compact()
    assert len(in_delta.delta().file_uris()) == 1
    in_delta.delta().vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    assert not in_delta.publish().is_new
    in_delta.put({"a.tar": make_tar(members[120:160])}, remove=("f.tar",))
    in_delta.label(Selection(prune=True))
    done = in_delta.publish(file_bytes=SMALL_FILES)
    assert done.increment.replaced.to_pylist() == [in_delta.shard_uri("a.tar")]
    assert in_delta.published() == in_delta.predictions()


def test_a_table_that_its_owner_has_put_back_is_brought_up_to_date(in_delta: Place, members: Members) -> None:
    in_delta.put(first_day(members))
    in_delta.label()
    in_delta.publish()
    in_delta.put({"new.tar": make_tar(members[120:160])})
    in_delta.label()
    in_delta.publish()
    in_delta.delta().restore(0)
    assert len(in_delta.published()) == 60
    in_delta.publish()
    assert in_delta.published() == in_delta.predictions()


def test_a_copy_of_a_table_without_its_transactions_gets_no_row_twice(
    in_delta: Place, members: Members
) -> None:
    """As a tool makes it that knows rows, and nothing of the log."""
    import deltalake

    other = Place(in_delta.root, "delta", "output.topk=3")
    in_delta.put(first_day(members))
    for place in (in_delta, other):
        place.label()
        place.publish()
    in_delta.put({"new.tar": make_tar(members[120:160])})
    in_delta.label()
    in_delta.publish()
    rows = in_delta.delta().to_pyarrow_table()
    shutil.rmtree(f"{in_delta.root}/table")
    deltalake.write_deltalake(f"{in_delta.root}/table", rows, partition_by=["model"])
    assert in_delta.table().read().files
    done = in_delta.publish()
    assert (done.is_new, done.snapshot.version) == (True, 3)  # readers know what is new by that
    found = in_delta.delta().to_pyarrow_table()
    assert Counter(found["model"].to_pylist()) == {in_delta.partition.model: 80, other.partition.model: 60}
    assert not in_delta.publish().is_new


def test_another_kind_of_table_is_left_alone(in_delta: Place, members: Members) -> None:
    import deltalake

    in_delta.put({"a.tar": make_tar(members[:20])})
    in_delta.label()
    deltalake.write_deltalake(f"{in_delta.root}/table", pa.table({"x": [1]}))
    with pytest.raises(StorageError, match="not partitioned by model"):
        in_delta.publish()


def test_a_killed_publisher_is_told_from_one_that_failed(local: Place, members: Members) -> None:
    """The way these tests kill publishers does so."""
    local.put({"a.tar": make_tar(members[:4])})
    local.label()
    child = local.start_publishing(Crash(1, "before"))
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert local.published() == []


def test_what_a_kill_in_the_middle_of_a_write_has_left_is_removed(local: Place, members: Members) -> None:
    """From the table by the next publication; from beside the labels by the run after one that died."""
    local.put({"a.tar": make_tar(members[:4])})
    local.label()
    local.publish()
    files = [Path(uri) for folder in ("table", "out") for uri in local.objects(folder)]
    left = [folder / f".{number:032x}.tmp" for number, folder in enumerate({file.parent for file in files})]
    assert len(left) > 5
    for path in left:
        path.write_bytes(b"half of a file")
    assert not local.publish().is_new
    assert {path.exists() for path in left if "/table/" in str(path)} == {False}
    [lease] = [path for path in files if path.name == "lease.json"]
    assert '"released"' in lease.read_text()
    lease.write_text(lease.read_text().replace('"released"', '"held"'))  # and it has run out
    local.label()
    assert not [path for path in left if path.exists()]
    assert all(file.exists() for file in files)


def test_what_another_has_labelled_and_published_a_moment_ago_stays(
    local: Place, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While this publisher has begun, and not yet read the table."""
    local.put(first_day(members))
    local.label()
    slow = local.table()
    read = slow.read

    def later() -> Any:
        local.put({"new.tar": make_tar(members[120:160])})
        local.label()
        local.publish()
        return read()

    monkeypatch.setattr(slow, "read", later)
    assert not publishing.publish(local.partition, slow).is_new
    assert local.published() == local.predictions()
