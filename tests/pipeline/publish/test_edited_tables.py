"""Edited Delta tables: maintenance is allowed, every other edit is refused until a rebuild."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.storage import StorageError
from tests.pipeline.publish.tables import Datasets, WatchedStorage, changes, needs_delta

needs_delta()
import deltalake  # noqa: E402

Edit = Callable[[Datasets], None]


@pytest.fixture
def both(tmp_path: Path) -> Datasets:
    """Two datasets in one table."""
    both = Datasets(str(tmp_path))
    for dataset in both:
        dataset.publish()
    return both


def deletes_a_row(both: Datasets) -> None:
    both.one.delta().delete(f"shard = '{both.one.shard('b')}' AND index = 3")


def deletes_all_rows(both: Datasets) -> None:
    both.one.delta().delete()


def deletes_a_shard_and_compacts(both: Datasets) -> None:
    both.one.delta().delete(f"shard = '{both.two.shard('z')}'")
    both.one.delta().optimize.compact()


def appends_all_rows_again(both: Datasets) -> None:
    deltalake.write_deltalake(both.one.delta(), both.one.delta().to_pyarrow_table(), mode="append")


def restores_the_first_version(both: Datasets) -> None:
    both.one.delta().restore(1)


def deletes_the_list_of_shards(both: Datasets) -> None:
    for uri in both.one.lists():
        both.one.storage.delete(uri)


EDITS: dict[Edit, str] = {
    deletes_a_row: "DELETE in version 3 of the table",
    deletes_all_rows: "DELETE in version 3 of the table",
    deletes_a_shard_and_compacts: "DELETE in version 3 of the table",
    appends_all_rows_again: "WRITE in version 3 of the table",
    restores_the_first_version: "RESTORE in version 3 of the table",
    deletes_the_list_of_shards: "the list of shards is missing: ",
}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edited_table_is_refused_until_all_datasets_are_republished(both: Datasets, edit: Edit) -> None:
    one, two = both
    edit(both)
    before = one.objects(one.table)
    for dataset in both:
        with pytest.raises(StorageError) as raised:
            dataset.publish()
        cause = f"the rows of model={one.partition.model} differ from the published rows: {EDITS[edit]}"
        assert str(raised.value).startswith(f"{one.table}: {cause}")
        assert "publish every dataset of the model again, with --rebuild" in str(raised.value)
    assert one.objects(one.table) == before

    done = one.publish(rebuild=True)
    assert done.snapshot.version == 3  # readers find new rows by the version
    rows = one.published()
    assert [row for row in rows if row["shard"].startswith(f"{one.root}/in/")] == one.labels()
    two.publish()
    assert one.published() == both.labels()
    for dataset in both:
        assert not dataset.publish().is_new


def test_rebuild_publishes_an_intact_table_again(both: Datasets) -> None:
    one, two = both
    one.label(b=3, remove=["a"])
    done = one.publish(rebuild=True)
    assert changes(done, one.root) == {"added": ["b", "c"], "replaced": ["b", "c"], "removed": ["a"]}
    assert one.published() == both.labels()
    assert not two.publish().is_new
    assert one.publish(rebuild=True).is_new
    assert one.published() == both.labels()


def test_rebuild_without_a_table_creates_one(tmp_path: Path) -> None:
    one, _ = Datasets(str(tmp_path))
    assert one.publish(rebuild=True).snapshot.version == 1
    assert one.published() == one.labels()


def test_edit_during_a_commit_is_detected(tmp_path: Path) -> None:
    """Added rows do not conflict with the commit in Delta, so the commit succeeds."""
    one, _ = Datasets(str(tmp_path))
    one.publish()
    one.label(d=3)

    def edit(uri: str) -> None:
        if "/_cvt_label/" in uri and one.delta().version() == 1:
            deltalake.write_deltalake(one.delta(), one.delta().to_pyarrow_table(), mode="append")

    one.publish(WatchedStorage(before=edit), file_bytes=1)
    with pytest.raises(StorageError, match="WRITE in version 2"):
        one.publish()
    one.publish(rebuild=True)
    assert one.published() == one.labels()


def test_compacted_and_vacuumed_table_can_be_updated(both: Datasets) -> None:
    one, two = both
    one.delta().optimize.compact()
    one.delta().optimize.z_order(["label"])
    one.delta().vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    assert len(one.delta().file_uris()) == 1
    assert not one.publish().is_new
    assert not two.publish().is_new
    one.label(b=3, remove=["a"])
    assert changes(one.publish(), one.root) == {"added": ["b"], "replaced": ["b"], "removed": ["a"]}
    assert one.published() == both.labels()
    two.label(a=3)
    two.publish()
    assert one.published() == both.labels()


def test_log_without_the_last_publication_is_refused(both: Datasets) -> None:
    """A checkpoint lets Delta remove old log entries, and the table was compacted."""
    one, _ = both
    one.delta().optimize.z_order(["label"])
    one.delta().create_checkpoint()
    for path in Path(one.table, "_delta_log").glob("*.json"):
        if path.stem < f"{one.delta().version():020d}":
            path.unlink()
    with pytest.raises(StorageError, match="the log no longer reaches back to the publication"):
        one.publish()


def test_copy_of_the_rows_without_the_log_is_refused(both: Datasets) -> None:
    one, _ = both
    rows = one.delta().to_pyarrow_table()
    shutil.rmtree(one.table)
    deltalake.write_deltalake(one.table, rows, partition_by=["model"])
    for rebuild in (False, True):
        with pytest.raises(StorageError, match=f"rows of model={one.partition.model}, .* use another table"):
            one.publish(rebuild=rebuild)


def test_foreign_table_is_refused(tmp_path: Path) -> None:
    one, _ = Datasets(str(tmp_path))
    deltalake.write_deltalake(one.table, pa.table({"x": [1]}))
    for rebuild in (False, True):
        with pytest.raises(StorageError, match="not partitioned by exactly the column model"):
            one.publish(rebuild=rebuild)


def test_table_with_deletion_vectors_is_refused(tmp_path: Path) -> None:
    one, _ = Datasets(str(tmp_path))
    one.publish()
    one.delta().alter.add_feature(
        deltalake.TableFeatures.DeletionVectors, allow_protocol_versions_increase=True
    )
    one.label(d=3)
    with pytest.raises(StorageError, match="deletion vectors"):
        one.publish()


def test_missing_data_file_is_named(both: Datasets) -> None:
    one, two = both
    [path] = Path(one.table).glob("model=*/*00000002-*.parquet")
    path.unlink()
    two.label(d=3)
    with pytest.raises(StorageError, match=rf"{path.name}: no such file"):
        two.publish()


def test_invalid_data_file_is_named(both: Datasets) -> None:
    """The file is read because it has rows of another dataset."""
    one, _ = both
    [path] = Path(one.table).glob("model=*/*00000002-*.parquet")
    path.write_bytes(b"not Parquet")
    one.label(d=3)
    with pytest.raises(StorageError, match=rf"{path.name}: not a file of prediction rows"):
        one.publish()
