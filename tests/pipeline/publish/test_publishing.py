"""Publishing a partition as a Delta table, in a folder and in a bucket."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfigError
from pipeline.publish import TableBusyError
from pipeline.publish.data_files import write_data_file
from pipeline.storage import StorageError
from tests.pipeline.publish.tables import Dataset, WatchedStorage, changes, needs_delta, predictions

needs_delta()
import deltalake  # noqa: E402

#: The size of the rows of one or two shards, so that a table has several files and no file counts as small.
SMALL_FILES = 2000
KEYS = ("../../x", "it's", '"; DROP TABLE t; --', "' OR 1=1 --")


@pytest.fixture(params=["folder", "bucket"])
def anywhere(request: pytest.FixtureRequest) -> Dataset:
    return Dataset(str(request.getfixturevalue("tmp_path" if request.param == "folder" else "bucket")))


@pytest.fixture
def local(tmp_path: Path) -> Dataset:
    return Dataset(str(tmp_path))


def hostile(dataset: Dataset, name: str) -> pa.Table:
    """Makes predictions with hostile keys."""
    rows = predictions(dataset.shard(name), len(KEYS))
    return rows.set_column(1, rows.schema.field(1), pa.array(KEYS))


def first_day(dataset: Dataset) -> None:
    """Labels four shards."""
    dataset.label(
        hostile(dataset, "a.tar"),
        **{"b'; --.tar": 10, "c=d/e.tar": 20, "f.tar": 10},
    )


def assert_no_leftovers(dataset: Dataset) -> None:
    """Asserts that there is one list of shards, and no unfinished file."""
    assert len(dataset.lists()) == 1
    if dataset.root.startswith("/"):
        assert not list(Path(dataset.table).rglob("*.tmp"))


def test_every_version_has_the_rows_of_the_prediction_files(anywhere: Dataset) -> None:
    first_day(anywhere)
    history = {1: anywhere.labels()}
    assert len(history[1]) == 44
    done = anywhere.publish(file_bytes=SMALL_FILES)
    assert (done.snapshot.version, done.snapshot.rows, done.is_new) == (1, 44, True)
    assert len(done.snapshot.files) > 2
    assert anywhere.published() == history[1]

    before = anywhere.objects(anywhere.table)
    assert not anywhere.publish(file_bytes=SMALL_FILES).is_new
    assert anywhere.objects(anywhere.table) == before

    anywhere.label(**{"new.tar": 20})
    history[2] = anywhere.labels()
    done = anywhere.publish(file_bytes=SMALL_FILES)
    assert changes(done, anywhere.root) == {"added": ["new.tar"]}
    assert anywhere.published() == history[2]

    anywhere.label(remove=["f.tar"], **{"b'; --.tar": 15})
    history[3] = anywhere.labels()
    done = anywhere.publish(file_bytes=SMALL_FILES)
    found = changes(done, anywhere.root)
    assert found == {"added": ["b'; --.tar"], "replaced": ["b'; --.tar"], "removed": ["f.tar"]}

    assert history[1] != history[2] != history[3]
    for version, rows in history.items():
        assert anywhere.published(version) == rows
    assert {*KEYS} <= {row["key"] for row in history[3]}
    assert any(row["error"] for row in history[3])


def test_increment_keeps_large_files_and_merges_small_ones(local: Dataset) -> None:
    first_day(local)
    first = local.publish(file_bytes=SMALL_FILES).snapshot
    local.label(new=2)
    second = local.publish(file_bytes=SMALL_FILES).snapshot
    assert {file.path for file in first.files} < {file.path for file in second.files}
    local.label(newer=2)
    third = local.publish().snapshot  # with the default size, all files are small
    assert len(third.files) == 1
    assert local.published() == local.labels()


def test_changed_shard_rewrites_only_the_files_with_its_rows(local: Dataset) -> None:
    local.label(a=20, b=20, c=20)
    first = local.publish(file_bytes=1).snapshot
    local.label(b=5)
    second = local.publish(file_bytes=1).snapshot
    before, after = ({file.path for file in each.files} for each in (first, second))
    assert (len(before), len(after), len(before & after)) == (3, 3, 2)
    assert local.published() == local.labels()


def test_published_column_is_the_version_that_added_the_row(local: Dataset) -> None:
    local.label(a=5, b=6)
    local.publish()
    local.label(a=3, c=4)
    local.publish()
    rows = local.delta().to_pyarrow_table().to_pylist()
    assert Counter((row["shard"], row["published"]) for row in rows) == {
        (local.shard("a"), 2): 3,
        (local.shard("b"), 1): 6,
        (local.shard("c"), 2): 4,
    }


def test_rows_are_sorted_by_label_and_score(local: Dataset) -> None:
    local.label(a=30, b=30)
    [file] = local.publish().snapshot.files
    rows = pq.read_table(f"{local.table}/{file.path}", partitioning=None)
    pairs = list(zip(rows["label"].to_pylist(), rows["score"].to_pylist(), strict=True))
    assert pairs[-2:] == [(None, None)] * 2  # errors
    assert pairs[:-2] == sorted(pairs[:-2])


def test_row_groups_of_sorted_rows_can_be_skipped(local: Dataset) -> None:
    local.label(a=30, b=30)
    [file] = local.publish().snapshot.files
    rows = pq.read_table(f"{local.table}/{file.path}", partitioning=None)
    write_data_file(local.storage, local.table, "small-groups.parquet", rows, row_group_rows=10)
    groups = pq.ParquetFile(f"{local.table}/small-groups.parquet").metadata
    assert groups.num_row_groups == 6
    ranges = [groups.row_group(i).column(3).statistics for i in range(6)]
    label = rows["label"][0].as_py()
    assert 1 <= sum(r.min <= label <= r.max for r in ranges if r.has_min_max) < 6
    assert groups.row_group(0).column(5).has_column_index


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_embeddings_can_be_omitted_and_added_later(tmp_path: Path, precision: str) -> None:
    dataset = Dataset(str(tmp_path), embedding=precision)
    dataset.label(a=5, b=6)
    assert dataset.publish(embedding=False).snapshot.version == 1
    assert [row for row in dataset.published() if "embedding" in row] == []
    assert not dataset.publish(embedding=True).is_new
    done = dataset.publish(embedding=True, rebuild=True)
    assert changes(done, dataset.root) == {"added": ["a", "b"], "replaced": ["a", "b"]}
    assert dataset.published() == dataset.labels()
    assert sum("embedding" in row for row in dataset.published()) == 9
    assert not dataset.publish(embedding=True).is_new


def test_rebuild_omits_labels_that_the_manifest_does_not_have(tmp_path: Path) -> None:
    dataset = Dataset(str(tmp_path))
    dataset.label(a=5, b=6)
    dataset.publish()
    os.utime(dataset.prediction_uri("a"), ns=(1, 1))
    done = dataset.publish(rebuild=True)
    found = {"added": ["b"], "replaced": ["b"], "removed": ["a"], "pending": ["a"]}
    assert changes(done, dataset.root) == found
    assert {row["shard"] for row in dataset.published()} == {dataset.shard("b")}


def test_publisher_that_dies_at_any_write_leaves_a_complete_version(local: Dataset, tmp_path: Path) -> None:
    """Copies the table before each write: a publisher that dies at this write leaves the copied state."""
    first_day(local)
    local.publish(file_bytes=SMALL_FILES)
    old = local.labels()
    local.label(remove=["f.tar"], **{"a.tar": 15, "new.tar": 10})
    new = local.labels()
    table, numbers = Path(local.table), count()

    def copy(uri: str) -> None:
        shutil.copytree(table, tmp_path / "states" / f"{next(numbers):02d}")

    local.publish(WatchedStorage(before=copy), file_bytes=SMALL_FILES)
    states = sorted((tmp_path / "states").iterdir())
    assert len(states) >= 5
    seen = []
    for state in states:
        shutil.rmtree(table)
        state.rename(table)
        seen.append(local.published())
        local.publish(file_bytes=SMALL_FILES)
        assert local.published() == new
        assert_no_leftovers(local)
    committed = seen.index(new)
    assert 3 <= committed < len(states)
    assert seen == [old] * committed + [new] * (len(states) - committed)


DYING = """
import os, signal, sys
from tests.pipeline.publish.tables import Dataset, WatchedStorage

remaining = [int(sys.argv[2])]

def die(uri):
    remaining[0] -= 1
    if not remaining[0]:
        os.kill(os.getpid(), signal.SIGKILL)

Dataset(sys.argv[1]).publish(WatchedStorage(before=die))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "is_committed"), [(2, False), (3, True)])
def test_killed_first_publisher_leaves_no_rows_or_all_rows(
    local: Dataset, number: int, is_committed: bool
) -> None:
    """The publisher dies before it writes the list of shards, or after the commit."""
    local.label(a=5, b=6)
    done = subprocess.run([sys.executable, "-c", DYING, local.root, str(number)], timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL
    assert local.published() == (local.labels() if is_committed else [])
    assert local.publish().is_new != is_committed
    assert local.published() == local.labels()
    assert_no_leftovers(local)


def test_concurrent_publishers_add_each_shard_once(anywhere: Dataset) -> None:
    first_day(anywhere)
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: anywhere.publish(), range(4)))
    assert sum(each.is_new for each in done) == 1
    assert anywhere.published() == anywhere.labels()
    assert not anywhere.publish().is_new
    assert_no_leftovers(anywhere)


def run_before_commit(action: Callable[[], object], times: int = 1) -> WatchedStorage:
    """Returns a publisher's storage that calls an action just before the first commits of the publisher."""
    remaining = iter(range(times))

    def before(uri: str) -> None:
        if "/_cvt_label/" in uri and uri.endswith(".parquet") and next(remaining, None) is not None:
            action()

    return WatchedStorage(before=before)


def test_publisher_restarts_from_a_concurrent_version(local: Dataset) -> None:
    first_day(local)

    def other() -> None:
        local.label(new=20)
        assert local.publish().is_new

    done = local.publish(run_before_commit(other))
    assert (done.is_new, done.snapshot.version) == (False, 1)
    assert local.published() == local.labels()
    assert_no_leftovers(local)


def test_publisher_gives_up_after_repeated_concurrent_commits(local: Dataset) -> None:
    first_day(local)
    numbers = count(1)

    def other() -> None:
        local.label(new=next(numbers))
        assert local.publish().is_new
        local.label(new=next(numbers))

    with pytest.raises(TableBusyError, match=r"changed during all 5 attempts \(.*another publisher"):
        local.publish(run_before_commit(other, 5))


def test_labels_that_change_during_publishing_are_reread(local: Dataset) -> None:
    local.label(a=5, b=6)
    first_read = iter([True])

    class Racing(WatchedStorage):
        def open(self, uri: str, version: str | None = None) -> io.BufferedReader:
            if uri == local.prediction_uri("a") and version is not None and next(first_read, False):
                local.label(a=7)
            return super().open(uri, version)

    assert local.publish(Racing(before=lambda uri: None)).is_new
    assert local.published() == local.labels()
    assert len(local.labels()) == 13


def test_commit_with_a_lost_response_succeeds(local: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    local.label(a=5)
    local.publish()
    local.label(b=6)
    commit = deltalake.DeltaTable.create_write_transaction

    def commit_and_fail(self: Any, *arguments: Any, **options: Any) -> None:
        commit(self, *arguments, **options)
        raise deltalake.exceptions.CommitFailedError("0")

    with monkeypatch.context() as patch:
        patch.setattr(deltalake.DeltaTable, "create_write_transaction", commit_and_fail)
        assert local.publish().snapshot.version == 2
    assert local.published() == local.labels()
    assert not local.publish().is_new
    assert_no_leftovers(local)


def test_failed_commit_is_reported_and_leaves_no_rows(
    local: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.label(a=5)

    def fail(self: Any, *arguments: Any, **options: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(deltalake.DeltaTable, "create_write_transaction", fail)
        with pytest.raises(StorageError, match=r"table: the transaction was not committed: no space left"):
            local.publish()
    assert local.published() == []
    assert local.publish().is_new


def test_failed_publication_adds_no_rows(local: Dataset) -> None:
    local.label(a=20, b=20)

    def full(uri: str) -> None:
        if uri.endswith("-0001.parquet"):
            raise StorageError(uri, "no space left")

    with pytest.raises(StorageError, match=r"table: cannot be written: no space left"):
        local.publish(WatchedStorage(before=full), file_bytes=1)
    assert local.published() == []
    local.publish()
    assert local.published() == local.labels()


def test_labels_newer_than_the_manifest_are_not_published(local: Dataset) -> None:
    """A running or killed run has written prediction files but not yet the manifest."""
    local.label(a=5, b=6)
    local.publish()
    old, uri = local.published(), local.partition.manifest.uri
    manifest = local.storage.read(uri)
    local.label(a=3, new=4)
    newer = local.storage.read(uri)
    local.storage.write(uri, manifest)
    assert not local.publish().is_new
    table = pq.read_table(io.BytesIO(manifest))
    versions = pa.array(["0-0", table["output_version"][1].as_py()])
    column = table.schema.get_field_index("output_version")
    out = io.BytesIO()
    pq.write_table(table.set_column(column, table.schema.field(column), versions), out)
    local.storage.write(uri, out.getvalue())
    done = local.publish()
    assert (done.is_new, changes(done, local.root)) == (False, {"pending": ["a"]})
    assert local.published() == old
    local.storage.write(uri, newer)
    local.publish()
    assert local.published() == local.labels()


def test_table_without_shards_is_readable(local: Dataset) -> None:
    local.label(a=5, b=6)
    local.publish()
    local.label(remove=["a", "b"])
    assert local.publish().is_new
    assert local.published() == []
    assert "label" in local.delta().to_pyarrow_table().column_names
    local.label(c=3)
    local.publish()
    assert local.published() == local.labels()


def test_models_share_a_table(tmp_path: Path) -> None:
    one, two = (Dataset(str(tmp_path), f"cvt-0000000{number}") for number in (1, 2))
    one.label(a=5)
    two.label(a=5, b=6)
    assert one.publish().snapshot.version == 1
    assert two.publish().snapshot.version == 1
    assert not one.publish().is_new
    assert not two.publish().is_new
    models = one.delta().to_pyarrow_table()["model"].to_pylist()
    assert Counter(models) == {one.partition.model: 5, two.partition.model: 11}


def test_publications_during_those_of_another_model_succeed(tmp_path: Path) -> None:
    """A second model is published just before each commit of the first model."""
    one, two = (Dataset(str(tmp_path), f"cvt-0000000{number}") for number in (1, 2))
    for day in ({"a": 5}, {"b": 6}):
        one.label(**day)
        two.label(**day)
        assert one.publish(run_before_commit(two.publish)).is_new
    models = one.delta().to_pyarrow_table()["model"].to_pylist()
    assert Counter(models) == {each.partition.model: 11 for each in (one, two)}


def test_concurrent_first_publications_of_models_succeed(tmp_path: Path) -> None:
    models = [Dataset(str(tmp_path), f"cvt-0000000{number}") for number in range(4)]
    for each in models:
        each.label(a=3)
    with ThreadPoolExecutor(4) as pool:
        assert all(done.is_new for done in pool.map(Dataset.publish, models))
    found = models[0].delta().to_pyarrow_table()["model"].to_pylist()
    assert Counter(found) == {each.partition.model: 3 for each in models}


def test_shard_without_rows_is_published_once(local: Dataset) -> None:
    local.label(a=0)
    assert local.publish().is_new
    assert local.published() == []
    assert not local.publish().is_new


def test_update_is_one_commit_with_the_transaction_of_the_model(local: Dataset) -> None:
    local.label(a=5, b=6)
    first = local.publish()
    local.label(a=7, remove=["b"])
    second = local.publish()
    app = f"cvt-label/model={local.partition.model}"
    for version, done in enumerate([first, second], 1):
        assert local.delta(version).transaction_version(app) >> 32 == done.snapshot.version
    log = Path(local.table, "_delta_log", f"{2:020d}.json")
    actions = [next(iter(json.loads(line))) for line in log.read_text().splitlines()]
    assert Counter(actions) == {"commitInfo": 1, "add": 1, "remove": 1, "txn": 1}


def test_models_and_shards_with_unusual_names_are_published(anywhere: Dataset) -> None:
    dataset = Dataset(anywhere.root, "a model: 100 %-00000001")
    names = ["x" * 251 + ".tar", "日" * 83 + "a.tar", "=" * 200 + ".tar", "%41 b.tar"]
    dataset.label(**dict.fromkeys(names, 3))
    dataset.publish()
    dataset.label(remove=names[:2], **{names[2]: 2})
    dataset.publish()
    assert dataset.published() == dataset.labels()
    assert len(dataset.labels()) == 5


@pytest.mark.parametrize("where", ["out", "out/table", "in/table", "."])
def test_table_in_the_output_or_the_input_is_refused(local: Dataset, where: str) -> None:
    local.label(a=5)
    local.table = f"{local.root}/{where}"
    with pytest.raises(ConfigError, match=r"the table must be outside the (output|input)"):
        local.publish()


def test_leftovers_of_killed_writers_are_removed(local: Dataset) -> None:
    local.label(a=5)
    local.publish()
    folders = {path.parent for path in Path(local.table).rglob("*") if path.is_file()}
    leftovers = [folder / f".{number:032x}.tmp" for number, folder in enumerate(folders)]
    for path in leftovers:
        path.write_bytes(b"part of a file")
    assert not local.publish().is_new
    assert len(leftovers) == 3
    assert not any(path.exists() for path in leftovers)
