"""Publishing a partition as a table of either format, in a folder and in a bucket."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfigError
from pipeline.predictions import LABEL_SCHEMA
from pipeline.publish import TableBusyError
from pipeline.storage import ObjectInfo, StorageError
from tests.pipeline.publish.tables import TABLE_COLUMNS, Dataset, WatchedStorage, changes, predictions

KEYS = ("../../x", "it's", '"; DROP TABLE t; --', "' OR 1=1 --")
#: Memory for the rows of one or two shards, so that rows are in several sorted tables.
SMALL_MEMORY = 4 * 2000


def hostile(dataset: Dataset, name: str) -> pa.Table:
    """Makes predictions with hostile keys."""
    rows = predictions(dataset.shard(name), len(KEYS))
    return rows.set_column(1, rows.schema.field(1), pa.array(KEYS))


def first_day(dataset: Dataset) -> None:
    """Labels four shards."""
    dataset.label(hostile(dataset, "a.tar"), **{"b'; --.tar": 10, "c=d/e.tar": 20, "f.tar": 10})


def before_commit(action: Callable[[], object], times: int = 1) -> WatchedStorage:
    """Returns a publisher's storage that calls an action in the first attempts of the publisher.

    The action is called when the publisher reads the shard `a`, after it has read the table.
    """
    attempts = iter(range(times))

    def before(uri: str) -> None:
        if uri.endswith("/in/a.parquet") and next(attempts, None) is not None:
            action()

    return WatchedStorage(before=before)


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes attempts follow each other at once."""
    monkeypatch.setattr("pipeline.publish.publishing.pause_after", lambda attempt: 0)


def test_every_version_has_the_rows_of_the_prediction_files(anywhere: Dataset) -> None:
    dataset, history = anywhere, {}
    first_day(dataset)
    done = dataset.publish(memory_bytes=SMALL_MEMORY)
    history[done.version] = dataset.labels()
    assert changes(done, dataset.root) == {"added": ["a.tar", "b'; --.tar", "c=d/e.tar", "f.tar"]}

    before = dataset.objects(dataset.table)
    again = dataset.publish(memory_bytes=SMALL_MEMORY)
    assert (again.version, again.published_at, changes(again, dataset.root)) == (done.version, None, {})
    assert dataset.objects(dataset.table) == before

    dataset.label(**{"new.tar": 20})
    done = dataset.publish(memory_bytes=SMALL_MEMORY)
    history[done.version] = dataset.labels()
    assert changes(done, dataset.root) == {"added": ["new.tar"]}

    dataset.label(remove=["f.tar"], **{"b'; --.tar": 15})
    done = dataset.publish(memory_bytes=SMALL_MEMORY)
    history[done.version] = dataset.labels()
    found = {"added": ["b'; --.tar"], "replaced": ["b'; --.tar"], "removed": ["f.tar"]}
    assert changes(done, dataset.root) == found

    assert [len(rows) for rows in history.values()] == [44, 64, 59]
    assert list(history) == [version for version, operation in dataset.history()][-3:]
    for version, rows in history.items():
        assert dataset.published(version) == rows
    assert dataset.published() == dataset.labels()
    assert {*KEYS} <= {row["key"] for row in dataset.published()}
    assert any(row["error"] for row in dataset.published())


def test_columns_of_a_row_name_its_model_origin_and_publication(local: Dataset) -> None:
    local.label(a=5, b=6)
    first = local.publish()
    local.label(a=3, c=4)
    second = local.publish()
    manifest = local.partition.manifest.read(["uri", "output_version", "run"]).to_pylist()
    expected = {
        local.shard(name): {
            "model": "cvt-00000001",
            "source": local.uri,
            "output_version": row["output_version"],
            "run": row["run"],
            "published_at": done.published_at,
        }
        for name, row, done in zip("abc", manifest, (second, first, second), strict=True)
    }
    rows = local.rows().to_pylist()
    assert len(rows) == 13
    for row in rows:
        assert {name: row[name] for name in TABLE_COLUMNS} == expected[row["shard"]]
    assert first.published_at is not None
    assert second.published_at is not None
    assert first.published_at < second.published_at < datetime.now(UTC)


def test_table_has_the_documented_columns_and_types(local: Dataset) -> None:
    local.label(a=5)
    local.publish()
    found = {field.name: field.type for field in local.rows().schema}
    assert {*found} == {*LABEL_SCHEMA.names}
    for field in LABEL_SCHEMA:
        if pa.types.is_list(field.type):
            assert found[field.name].value_type == field.type.value_type, field.name
        else:
            assert str(found[field.name]).removeprefix("large_") == str(field.type), field.name


def test_each_increment_is_one_transaction(local: Dataset) -> None:
    """Readers of new rows skip transactions that replace rows, so new shards must be an append."""
    for day in ({"a": 5, "b": 6}, {"c": 3}, {"a": 4, "d": 2}):
        local.label(**day)
        local.publish(memory_bytes=1)
    local.label(remove=["a", "c"])
    local.publish()
    operations = [operation for _, operation in local.history() if operation != "create table"]
    assert operations == ["append", "append", "overwrite", "overwrite"]
    assert local.published() == local.labels()


def test_rows_are_sorted_by_label_and_score(local: Dataset) -> None:
    local.label(a=30, b=30)
    local.publish()
    [rows] = local.files().values()
    pairs = list(zip(rows["label"].to_pylist(), rows["score"].to_pylist(), strict=True))
    assert pairs[-2:] == [(None, None)] * 2  # errors
    assert pairs[:-2] == sorted(pairs[:-2])
    assert {*rows["shard"].to_pylist()[:20]} == {local.shard("a"), local.shard("b")}


def test_changed_shard_rewrites_only_the_files_with_its_rows(local: Dataset) -> None:
    for name in ("a", "b", "c"):
        local.label(**{name: 20})
        local.publish()
    before = {*local.files()}
    local.label(b=5)
    local.publish()
    after = {*local.files()}
    assert (len(before), len(after), len(before & after)) == (3, 3, 2)
    assert local.published() == local.labels()


def test_shards_next_to_a_replaced_shard_keep_their_rows(local: Dataset) -> None:
    """One file has the rows of all shards."""
    local.label(a=20, b=20, c=20)
    first = local.publish()
    assert len(local.files()) == 1
    local.label(b=5, remove=["c"])
    local.publish()
    kept = local.rows().filter(pc.field("shard") == local.shard("a"))
    assert pc.unique(kept["published_at"]).to_pylist() == [first.published_at]
    assert local.published() == local.labels()


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_embeddings_can_be_omitted_and_added_later(local: Dataset, precision: str) -> None:
    dataset = local
    dataset.embedding = precision
    dataset.label(a=5, b=6)
    dataset.publish(embedding=False)
    assert [row for row in dataset.published() if "embedding" in row] == []
    assert dataset.publish(embedding=True).published_at is None
    done = dataset.publish(embedding=True, rebuild=True)
    assert changes(done, dataset.root) == {"added": ["a", "b"], "replaced": ["a", "b"]}
    assert dataset.published() == dataset.labels()
    assert sum("embedding" in row for row in dataset.published()) == 9  # rows with an error have none
    assert dataset.rows().schema.field("embedding").type.value_type == pa.float32()


def test_shards_with_and_without_embeddings_share_a_table(local: Dataset) -> None:
    local.label(a=5)
    local.embedding = "float16"
    local.label(b=6)
    local.embedding = "float32"
    local.label(c=7)
    local.publish()
    assert local.published() == local.labels()
    found = {row["shard"] for row in local.published() if "embedding" in row}
    assert found == {local.shard("b"), local.shard("c")}


def test_first_publication_creates_a_missing_table_once(local: Dataset) -> None:
    local.label(a=5)
    assert local.version() is None
    first = local.publish()
    assert [version for version, _ in local.history()][-1] == first.version
    assert local.publish().version == first.version


def test_table_of_no_shards_is_readable_and_can_be_filled(local: Dataset) -> None:
    local.label(a=5, b=6)
    local.publish()
    local.label(remove=["a", "b"])
    assert changes(local.publish(), local.root) == {"removed": ["a", "b"]}
    assert local.published() == []
    assert "label" in local.rows().column_names
    local.label(c=3)
    local.publish()
    assert local.published() == local.labels()


def test_shard_without_rows_changes_nothing_until_it_has_rows(local: Dataset) -> None:
    local.label(a=0)
    assert local.publish().published_at is None
    assert local.published() == []
    local.label(b=3)
    assert changes(local.publish(), local.root) == {"added": ["b"]}
    local.label(a=2, b=0)
    assert changes(local.publish(), local.root) == {"added": ["a", "b"], "replaced": ["b"]}
    assert local.published() == local.labels()
    assert len(local.published()) == 2
    assert local.publish().published_at is None


def test_labels_newer_than_the_manifest_are_pending(local: Dataset) -> None:
    """A running or killed run has written prediction files but not yet the manifest."""
    local.label(a=5, b=6)
    local.publish()
    old, uri = local.published(), local.partition.manifest.uri
    manifest = local.storage.read(uri)
    local.label(a=3, new=4)
    newer = local.storage.read(uri)
    local.storage.write(uri, manifest)
    done = local.publish()
    assert (done.published_at, changes(done, local.root)) == (None, {})  # the table has the manifest's shards
    table = pq.read_table(io.BytesIO(manifest))
    versions = pa.array(["0-0", table["output_version"][1].as_py()])
    column = table.schema.get_field_index("output_version")
    out = io.BytesIO()
    pq.write_table(table.set_column(column, table.schema.field(column), versions), out)
    local.storage.write(uri, out.getvalue())
    done = local.publish()
    assert (done.published_at, changes(done, local.root)) == (None, {"pending": ["a"]})
    assert local.published() == old
    local.storage.write(uri, newer)
    local.publish()
    assert local.published() == local.labels()


def test_rebuild_omits_pending_shards(local: Dataset) -> None:
    local.label(a=5, b=6)
    local.publish()
    os.utime(local.prediction_uri("a"), ns=(1, 1))
    done = local.publish(rebuild=True)
    found = {"added": ["b"], "replaced": ["b"], "removed": ["a"], "pending": ["a"]}
    assert changes(done, local.root) == found
    assert {row["shard"] for row in local.published()} == {local.shard("b")}


def test_labels_that_change_during_publishing_are_read_again(local: Dataset) -> None:
    local.label(a=5, b=6)
    first_read = iter([True])

    def relabel(uri: str) -> None:
        if uri == local.prediction_uri("a") and next(first_read, False):
            local.label(a=7)

    assert local.publish(WatchedStorage(before=relabel)).published_at is not None
    assert local.published() == local.labels()
    assert len(local.labels()) == 13


def test_labels_that_are_deleted_during_publishing_are_pending(local: Dataset) -> None:
    """A run deletes prediction files before it writes the manifest."""
    local.label(a=5, b=6)
    first_read = iter([True])

    def delete(uri: str) -> None:
        if uri == local.prediction_uri("a") and next(first_read, False):
            local.storage.delete(uri)

    done = local.publish(WatchedStorage(before=delete))
    assert changes(done, local.root) == {"added": ["b"], "pending": ["a"]}
    assert local.published() == local.labels()


def test_labels_that_keep_changing_end_publishing(local: Dataset, without_pauses: None) -> None:
    local.label(a=5)
    cause = r"changed during all 5 attempts \(.*/in/a\.parquet: .*\); publish again later"
    with pytest.raises(TableBusyError, match=cause):
        local.publish(before_commit(lambda: local.label(a=5), 5))
    assert local.published() == []


def test_publisher_restarts_from_a_concurrent_publication(local: Dataset) -> None:
    local.label(a=5, b=6)

    def publish_more() -> None:
        local.label(c=20)
        assert local.publish().published_at is not None

    done = local.publish(before_commit(publish_more))
    assert (done.published_at, done.version) == (None, local.version())
    assert local.published() == local.labels()
    assert [operation for _, operation in local.history()].count("append") == 1


def test_publisher_gives_up_after_repeated_concurrent_commits(local: Dataset, without_pauses: None) -> None:
    local.label(a=5)
    other, numbers = Dataset(f"{local.root}/two", table_of=local), count(1)

    def publish_other() -> None:
        other.label(x=next(numbers))
        assert other.publish().published_at is not None

    with pytest.raises(
        TableBusyError, match=r"changed during all 5 attempts \(.*another writer committed first"
    ):
        local.publish(before_commit(publish_other, 5))
    assert local.published() == other.labels()
    local.publish(before_commit(publish_other, 4))
    assert len(local.published()) == len(local.labels()) + len(other.labels())


def test_two_first_publications_add_each_shard_once(anywhere: Dataset) -> None:
    """The other publisher creates the table and commits after the first one found no table."""
    first_day(anywhere)
    first_list = iter([True])

    class Slow(WatchedStorage):
        def list(self, uri: str, missing_ok: bool = True, prefix: str = "") -> Iterator[ObjectInfo]:
            if uri.endswith("/predictions") and next(first_list, False):
                assert anywhere.publish().published_at is not None
            return super().list(uri, missing_ok, prefix)

    assert anywhere.publish(Slow(before=lambda uri: None)).published_at is None
    assert next(first_list, None) is None
    assert anywhere.published() == anywhere.labels()


def test_concurrent_publishers_add_each_shard_once(anywhere: Dataset) -> None:
    first_day(anywhere)
    assert anywhere.version() is None  # this prepares the SQL catalog, which fails in several threads
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: anywhere.publish(), range(4)))
    assert sum(each.published_at is not None for each in done) == 1
    assert anywhere.published() == anywhere.labels()
    assert anywhere.publish().published_at is None


def test_failed_publication_adds_no_rows(local: Dataset) -> None:
    local.label(a=20, b=20)

    def fail(uri: str) -> None:
        if uri == local.prediction_uri("b"):
            raise StorageError(uri, "input/output error")

    with pytest.raises(StorageError, match=r"/in/b\.parquet: input/output error"):
        local.publish(WatchedStorage(before=fail), memory_bytes=1)
    assert local.published() == []
    local.publish()
    assert local.published() == local.labels()


def test_damaged_prediction_file_is_named(local: Dataset) -> None:
    local.label(a=5, b=6)
    uri = local.prediction_uri("b")
    info = Path(uri).stat()
    table = pq.read_table(uri, partitioning=None)
    for content in (b"not Parquet", table.drop_columns(["label"])):
        out = io.BytesIO()
        pq.write_table(content, out) if isinstance(content, pa.Table) else out.write(content)
        data = out.getvalue().ljust(info.st_size, b"\0")
        Path(uri).write_bytes(data)
        os.utime(uri, ns=(info.st_atime_ns, info.st_mtime_ns))
        with pytest.raises(StorageError, match=r"/in/b\.parquet: not a file of prediction rows"):
            local.publish()
    assert local.published() == []


def test_models_and_shards_with_unusual_names_are_published(anywhere: Dataset) -> None:
    dataset = Dataset(anywhere.root, "a model's: 100 % ü-00000001", table_of=anywhere)
    names = ["x" * 251 + ".tar", "日" * 83 + "a.tar", "=" * 200 + ".tar", "%41 b.tar", 'it\'s \\ "a".tar']
    dataset.label(**dict.fromkeys(names, 3))
    dataset.publish()
    dataset.label(remove=names[:2], **{names[2]: 2, names[4]: 1})
    done = dataset.publish()
    assert changes(done, dataset.root) == {
        "added": sorted([names[2], names[4]]),
        "replaced": sorted([names[2], names[4]]),
        "removed": sorted(names[:2]),
    }
    assert dataset.published() == dataset.labels()
    assert len(dataset.labels()) == 6
    assert {*dataset.rows()["model"].to_pylist()} == {dataset.partition.model}
    assert dataset.publish().published_at is None


@pytest.mark.parametrize("where", ["out", "out/table", "in/table", "."])
def test_delta_table_in_the_output_or_the_input_is_refused(local: Dataset, where: str) -> None:
    local.label(a=5)
    local.to = f"delta:{local.root}/{where}"
    with pytest.raises(ConfigError, match=r"the table must be outside the (output|input)"):
        local.publish()
    assert not local.objects(f"{local.root}/{where}/_delta_log")


@pytest.mark.parametrize(
    "to", ["/table", "s3://bucket/table", "lance:/table", "delta", "", "iceberg:catalog", "iceberg:a.b"]
)
def test_unknown_format_is_refused(local: Dataset, to: str) -> None:
    local.label(a=5)
    local.to = to
    with pytest.raises(ConfigError, match=r"expected delta:URI or iceberg:CATALOG\.NAMESPACE\.TABLE"):
        local.publish()


def test_more_changes_than_a_transaction_lists_replace_all_rows(
    local: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.publish.publishing._MAX_DROPPED", 2)
    local.label(a=5, b=6, c=5, d=0, e=3)
    local.publish()
    local.label(a=3, b=4)
    done = local.publish()
    assert changes(done, local.root) == {"added": ["a", "b"], "replaced": ["a", "b"]}
    local.label(a=4, b=5, remove=["c"])
    done = local.publish()
    assert changes(done, local.root) == {
        "added": ["a", "b", "d", "e"],
        "replaced": ["a", "b", "e"],
        "removed": ["c"],
    }
    assert local.published() == local.labels()
    assert local.publish().published_at is None


def test_more_changes_than_a_transaction_lists_remove_no_pending_shard(
    local: Dataset, monkeypatch: pytest.MonkeyPatch, without_pauses: None
) -> None:
    monkeypatch.setattr("pipeline.publish.publishing._MAX_DROPPED", 1)
    local.label(a=5, b=6, c=5)
    local.publish()
    old = local.published()
    local.label(a=3, b=4)
    os.utime(local.prediction_uri("c"), ns=(1, 1))
    with pytest.raises(TableBusyError, match="published labels changed after the manifest was written"):
        local.publish()
    assert local.published() == old
    local.label(c=7)
    local.publish()
    assert local.published() == local.labels()


@pytest.mark.parametrize("rows", [200, 3000])
def test_memory_holds_a_bounded_number_of_rows(local: Dataset, rows: int) -> None:
    """Small shards are read ahead in threads, and large ones by one row group at a time."""
    shards, memory = 120_000 // rows, 4_000_000
    table = predictions("", rows)
    names = [local.shard(f"{number:03d}") for number in range(shards)]
    local.label(*(table.set_column(0, table.schema.field(0), pa.repeat(name, rows)) for name in names))
    before, allocated = pa.total_allocated_bytes(), list[int]()
    watched = WatchedStorage(before=lambda uri: allocated.append(pa.total_allocated_bytes() - before))
    local.publish(watched, memory_bytes=memory)
    assert len(allocated) >= shards
    found = local.rows()
    assert found.num_rows == shards * rows
    # deltalake collects rows, up to a number of rows.
    library = 64_000 * found.nbytes // found.num_rows if local.format == "delta" else 0
    assert max(allocated) < memory + library < found.nbytes * 0.8
