"""What only Iceberg tables have: catalogs, snapshots, isolation levels and the layout of files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.storage import StorageError
from tests.pipeline.publish.tables import Dataset, needs_format, reload_catalogs

needs_format("iceberg")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset = Dataset(str(tmp_path), format="iceberg")
    dataset.label(a=5, b=6)
    return dataset


def test_version_is_the_snapshot(dataset: Dataset) -> None:
    done = dataset.publish()
    assert done.version == dataset.iceberg().current_snapshot().snapshot_id
    assert dataset.publish().version == done.version
    assert [operation for _, operation in dataset.history()] == ["append"]


def test_new_table_is_partitioned_and_sorted(dataset: Dataset) -> None:
    dataset.publish()
    table = dataset.iceberg()
    assert [f"{field.transform}({field.name})" for field in table.spec().fields] == ["identity(model)"]
    order = [table.schema().find_field(field.source_id).name for field in table.sort_order().fields]
    assert order == ["label", "score"]


def test_new_snapshot_adds_files_and_keeps_those_of_other_shards(dataset: Dataset) -> None:
    dataset.publish()
    dataset.label(c=4)
    dataset.publish()
    dataset.label(c=2, remove=["b"])
    dataset.publish()
    summary = dataset.iceberg().current_snapshot().summary
    assert (summary["deleted-data-files"], summary["added-data-files"]) == ("2", "2")
    assert summary["total-records"] == str(len(dataset.labels()))
    assert dataset.published() == dataset.labels()


def test_rows_between_two_snapshots_are_the_added_rows(dataset: Dataset) -> None:
    """Readers of new rows use the files that an append adds."""
    dataset.publish()
    dataset.label(c=4)
    done = dataset.publish()
    added = dataset.iceberg().inspect.entries(done.version).to_pylist()
    assert [
        entry["data_file"]["record_count"] for entry in added if entry["snapshot_id"] == done.version
    ] == [4]


def test_bounds_of_shards_are_whole_uris(dataset: Dataset) -> None:
    """All URIs start in the same way."""
    dataset.publish()
    table = dataset.iceberg()
    [task] = table.scan().plan_files()
    field = table.schema().find_field("shard").field_id
    bounds = task.file.lower_bounds[field], task.file.upper_bounds[field]
    assert bounds == (dataset.shard("a").encode(), dataset.shard("b").encode())


def test_size_of_files_follows_from_the_memory(dataset: Dataset) -> None:
    dataset.label(**{f"s{number:02d}": 50 for number in range(20)})
    dataset.publish(memory_bytes=8 * 60_000)
    sizes = [table.nbytes for table in dataset.files().values()]
    assert 3 < len(sizes) < 20
    assert max(sizes) < 60_000


def test_empty_snapshot_is_the_first_of_a_table_without_rows(dataset: Dataset) -> None:
    dataset.label(a=0, b=0)
    done = dataset.publish()
    assert (done.version, done.published_at, dataset.version()) == (None, None, None)


def test_existing_namespace_is_used(dataset: Dataset) -> None:
    dataset.catalog().create_namespace("ns", {"owner": "somebody"})
    dataset.publish()
    assert dataset.catalog().load_namespace_properties("ns")["owner"] == "somebody"
    assert dataset.published() == dataset.labels()


def test_catalog_without_configuration_is_refused_with_the_remedy(dataset: Dataset) -> None:
    dataset.to = "iceberg:lake.ns.table"
    cause = r"the catalog lake cannot be used \(configuration: .*PYICEBERG_CATALOG__LAKE__URI\): "
    with pytest.raises(StorageError, match=rf"^iceberg:lake\.ns\.table: {cause}"):
        dataset.publish()


def test_weaker_isolation_level_is_refused(dataset: Dataset) -> None:
    dataset.publish()
    with dataset.iceberg().transaction() as transaction:
        transaction.set_properties({"write.delete.isolation-level": "snapshot"})
    cause = "the table has write.delete.isolation-level=snapshot; set it to serializable"
    with pytest.raises(StorageError, match=rf"^{re.escape(dataset.to)}: {cause}$"):
        dataset.publish()


def test_settings_of_the_table_are_respected(dataset: Dataset) -> None:
    dataset.publish()
    with dataset.iceberg().transaction() as transaction:
        transaction.set_properties({"write.parquet.compression-codec": "gzip", "write.data.path": ""})
    dataset.label(c=3)
    dataset.publish()
    assert dataset.published() == dataset.labels()


def test_branch_and_tag_keep_their_rows(dataset: Dataset) -> None:
    first = dataset.publish()
    old = dataset.published()
    dataset.iceberg().manage_snapshots().create_tag(first.version, "released").commit()
    dataset.label(a=3)
    dataset.publish()
    snapshot = dataset.iceberg().snapshot_by_name("released")
    assert dataset.published(snapshot.snapshot_id) == old
    assert dataset.published() == dataset.labels()


def test_other_partition_specs_in_the_history_are_kept(dataset: Dataset) -> None:
    """A table whose partitioning changed has files of both specs, and is refused while it has another one."""
    dataset.publish()
    with dataset.iceberg().update_spec() as spec:
        spec.add_identity("label")
    dataset.label(c=3)
    with pytest.raises(StorageError, match="is not partitioned by exactly model"):
        dataset.publish()
    with dataset.iceberg().update_spec() as spec:
        spec.remove_field("label")
    dataset.publish()
    assert dataset.published() == dataset.labels()


def test_files_with_rows_of_several_models_are_refused(dataset: Dataset) -> None:
    """Rewriting such a file would move the rows of other models into the partition of this model."""
    other = Dataset(f"{dataset.root}/two", "cvt-00000002", table_of=dataset)
    other.label(x=3)
    dataset.publish()
    other.publish()
    rows, catalog = dataset.rows(), dataset.catalog()
    copied = catalog.create_table("ns.copied", dataset.iceberg().schema())
    copied.append(rows)
    with copied.update_spec() as spec:
        spec.add_identity("model")
    dataset.to = dataset.to.replace("ns.table", "ns.copied")
    dataset.label(a=3)
    with pytest.raises(StorageError, match="has files that are not partitioned by model; publish to a new"):
        dataset.publish()
    assert catalog.load_table("ns.copied").scan().to_arrow().num_rows == len(rows)


def test_unreachable_catalog_is_reported_without_secrets(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:1"
    properties = {"TYPE": "rest", "URI": nowhere, "CREDENTIAL": "me:planted", "OAUTH2_SERVER_URI": nowhere}
    for key, value in properties.items():
        monkeypatch.setenv(f"PYICEBERG_CATALOG__LAKE__{key}", value)
    reload_catalogs()
    dataset.to = "iceberg:lake.ns.table"
    with pytest.raises(StorageError, match="the catalog lake cannot be used") as raised:
        dataset.publish()
    assert "planted" not in str(raised.value)
