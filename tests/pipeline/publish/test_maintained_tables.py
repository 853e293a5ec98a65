"""Tables that other programs changed: the state follows from their rows.

Restored, copied, compacted and vacuumed tables are updated like any other. What cannot be reconciled is
refused.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.predictions import LABEL_SCHEMA
from pipeline.storage import StorageError
from tests.pipeline.publish.tables import Dataset, Datasets, WatchedStorage, add_catalog, changes


@pytest.fixture
def both(local: Dataset) -> Datasets:
    """Two datasets in one table."""
    both = Datasets(local)
    for dataset in both:
        dataset.publish()
    return both


def delete(dataset: Dataset, shard: str, index: int | None = None) -> None:
    """Deletes a row of a shard, or all its rows, as another program would."""
    condition = f"shard = '{shard}'" + ("" if index is None else f" AND index = {index}")
    (dataset.delta() if dataset.format == "delta" else dataset.iceberg()).delete(condition)


def append(dataset: Dataset, rows: pa.Table) -> None:
    """Appends rows, as another program would."""
    if dataset.format == "delta":
        import deltalake

        deltalake.write_deltalake(dataset.delta(), rows, mode="append")
    else:
        dataset.iceberg().append(rows.cast(LABEL_SCHEMA))


def create(dataset: Dataset, schema: pa.Schema, partition_by: str = "model") -> None:
    """Creates an empty table, as another program would."""
    if dataset.format == "delta":
        import deltalake

        deltalake.DeltaTable.create(
            dataset.table, deltalake.Schema.from_arrow(schema), partition_by=partition_by or None
        )
        return
    dataset.catalog().create_namespace_if_not_exists("ns")
    table = dataset.catalog().create_table("ns.table", schema)
    with table.update_spec() as spec:
        if partition_by:
            spec.add_identity(partition_by)


def restore(dataset: Dataset, version: int) -> None:
    """Restores an old version of the table."""
    if dataset.format == "delta":
        dataset.delta().restore(version)
    else:
        dataset.iceberg().manage_snapshots().rollback_to_snapshot(version).commit()


def compacts(dataset: Dataset) -> None:
    if dataset.format == "delta":
        dataset.delta().optimize.compact()
        dataset.delta().optimize.z_order(["label"])
    else:
        dataset.iceberg().overwrite(dataset.iceberg().scan().to_arrow())
    assert len(dataset.files()) == 1


def removes_old_versions(dataset: Dataset) -> None:
    compacts(dataset)
    if dataset.format == "delta":
        dataset.delta().vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
        dataset.delta().create_checkpoint()
        newest = f"{dataset.delta().version():020d}"
        for path in Path(dataset.table, "_delta_log").glob("*.json"):
            if path.stem < newest:
                path.unlink()
    else:
        newest = dataset.version()
        for version, _ in dataset.history():
            if version != newest:
                dataset.iceberg().maintenance.expire_snapshots().by_id(version).commit()
    assert len(dataset.history()) <= 1


def is_copied(dataset: Dataset) -> None:
    """The copy has another location, and in Iceberg another catalog."""
    if dataset.format == "delta":
        shutil.copytree(dataset.table, f"{dataset.root}/copy")
        shutil.rmtree(dataset.table)
        dataset.table, dataset.to = f"{dataset.root}/copy", f"delta:{dataset.root}/copy"
        return
    metadata = dataset.iceberg().metadata_location
    Path(dataset.root, "copy").mkdir()
    catalog = add_catalog(f"{dataset.root}/copy", f"{dataset.root}/warehouse")
    dataset.to = f"iceberg:{catalog}.ns.table"
    dataset.catalog().create_namespace("ns")
    dataset.catalog().register_table("ns.table", metadata)


def is_written_again(dataset: Dataset) -> None:
    """A new table has the rows of the old one, with the columns in another order, and no history."""
    rows = dataset.rows()
    order = sorted(rows.column_names)
    if dataset.format == "delta":
        shutil.rmtree(dataset.table)
    else:
        dataset.catalog().drop_table("ns.table")
    create(dataset, pa.schema([LABEL_SCHEMA.field(name) for name in order]))
    append(dataset, rows.select(LABEL_SCHEMA.names))


MAINTENANCE = (compacts, removes_old_versions, is_copied, is_written_again)


@pytest.mark.parametrize("change", MAINTENANCE, ids=lambda change: change.__name__)
def test_maintained_table_is_up_to_date_and_can_be_updated(
    both: Datasets, change: Callable[[Dataset], None]
) -> None:
    one, two = both
    change(one)
    two.table, two.to = one.table, one.to
    assert one.published() == both.labels()
    assert one.publish().published_at is None
    assert two.publish().published_at is None
    one.label(b=3, d=2, remove=["a"])
    found = changes(one.publish(), one.root)
    assert found == {"added": ["b", "d"], "replaced": ["b"], "removed": ["a"]}
    two.label(a=3)
    two.publish()
    assert one.published() == both.labels()


def test_restored_table_gets_the_later_changes_again(local: Dataset) -> None:
    local.label(a=5, b=6)
    first = local.publish()
    old = local.labels()
    local.label(b=7, c=3, remove=["a"])
    local.publish()
    assert first.version is not None
    restore(local, first.version)
    assert local.published() == old
    found = changes(local.publish(), local.root)
    assert found == {"added": ["b", "c"], "replaced": ["b"], "removed": ["a"]}
    assert local.published() == local.labels()
    assert local.publish().published_at is None


def test_deleted_shard_is_added_again(both: Datasets) -> None:
    one, _ = both
    delete(one, one.shard("b"))
    assert changes(one.publish(), one.root) == {"added": ["b"]}
    assert one.published() == both.labels()


@pytest.mark.parametrize("version", ["", "~"], ids=["lower", "higher"])
def test_rows_of_another_version_are_replaced(both: Datasets, version: str) -> None:
    """Another program appended rows of the shard with another version."""
    one, _ = both
    rows = one.rows().filter(pc.field("shard") == one.shard("b"))
    column = rows.column_names.index("output_version")
    append(one, rows.set_column(column, rows.schema.field(column), pa.repeat(version, len(rows))))
    assert changes(one.publish(), one.root) == {"added": ["b"], "replaced": ["b"]}
    assert one.published() == both.labels()


def deletes_a_row(dataset: Dataset) -> None:
    delete(dataset, dataset.shard("b"), 3)


def appends_rows_again(dataset: Dataset) -> None:
    append(dataset, dataset.rows().filter(pc.field("shard") == dataset.shard("b")))


@pytest.mark.parametrize("edit", [deletes_a_row, appends_rows_again], ids=lambda edit: edit.__name__)
def test_edited_shard_is_refused_until_rebuild(both: Datasets, edit: Callable[[Dataset], None]) -> None:
    one, two = both
    edit(one)
    before, version = one.rows(), one.version()
    with pytest.raises(StorageError) as raised:
        one.publish()
    cause = f"the table was edited: rows of shard {one.shard('b')} were deleted or added"
    remedy = "replace all rows of this partition with --rebuild"
    assert str(raised.value) == f"{one.to}: {cause}; {remedy}"
    assert two.publish().published_at is None
    assert (one.rows(), one.version()) == (before, version)

    done = one.publish(rebuild=True)
    assert changes(done, one.root) == {"added": ["a", "b", "c"], "replaced": ["a", "b", "c"]}
    assert one.published() == both.labels()
    for dataset in both:
        assert dataset.publish().published_at is None


def test_edit_during_a_publication_is_found_by_the_next(both: Datasets) -> None:
    """In Delta, added rows of another application do not conflict, so the publication may succeed."""
    one, _ = both
    one.label(d=3)
    edits = iter([appends_rows_again])
    watched = WatchedStorage(
        before=lambda uri: "/predictions/" in uri and (edit := next(edits, None)) and edit(one)
    )
    with pytest.raises(StorageError, match="the table was edited"):  # noqa: PT012
        one.publish(watched)
        one.publish()
    one.publish(rebuild=True)
    assert one.published() == both.labels()


def without(*names: str) -> pa.Schema:
    """Returns the columns of tables without some of them."""
    return pa.schema([field for field in LABEL_SCHEMA if field.name not in names])


def text_score() -> pa.Schema:
    """Returns the columns of tables with another type of score."""
    return LABEL_SCHEMA.set(LABEL_SCHEMA.get_field_index("score"), pa.field("score", pa.string()))


FOREIGN: dict[str, tuple[pa.Schema, str, str]] = {
    "other table": (pa.schema({"x": pa.int64()}), "", "is not partitioned by exactly model|has "),
    "missing column": (without("run"), "model", "has no column run, expected string"),
    "missing embedding": (without("embedding"), "model", "has no column embedding, expected list<float>"),
    "more columns": (
        LABEL_SCHEMA.append(pa.field("note", pa.string())),
        "model",
        "has string column note, expected none",
    ),
    "other type": (text_score(), "model", "has string column score, expected float"),
    "no partitions": (LABEL_SCHEMA, "", "is not partitioned by exactly model"),
    "other partitions": (LABEL_SCHEMA, "label", "is not partitioned by exactly model"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_table_with_other_columns_or_partitions_is_refused(local: Dataset, case: str) -> None:
    schema, partition_by, cause = FOREIGN[case]
    create(local, schema, partition_by)
    before = local.objects(local.table)
    local.label(a=5)
    for rebuild in (False, True):
        message = rf"^{re.escape(local.to)}: the table ({cause}).*; publish to a new table$"
        with pytest.raises(StorageError, match=message):
            local.publish(rebuild=rebuild)
    assert local.objects(local.table) == before


def test_added_column_is_refused(both: Datasets) -> None:
    one, _ = both
    if one.format == "delta":
        import deltalake

        one.delta().alter.add_columns([deltalake.Field("note", "string")])
    else:
        from pyiceberg.types import StringType

        with one.iceberg().update_schema() as update:
            update.add_column("note", StringType())
    one.label(d=3)
    with pytest.raises(
        StorageError, match=r"has (large_)?string column note, expected none; publish to a new table"
    ):
        one.publish()


def test_missing_data_file_is_named(both: Datasets) -> None:
    one, two = both
    [uri] = [uri for uri, rows in one.files().items() if two.shard("z") in rows["shard"].to_pylist()]
    Path(uri).unlink()
    one.label(a=2)
    with pytest.raises(StorageError) as raised:
        one.publish()
    assert str(raised.value).startswith(f"{one.to}: cannot be read: ")
    assert Path(uri).name in str(raised.value)


def test_damaged_data_file_is_reported(both: Datasets) -> None:
    one, _ = both
    for uri in one.files():
        Path(uri).write_bytes(b"not Parquet".ljust(Path(uri).stat().st_size, b"\0"))
    with pytest.raises(StorageError, match=rf"^{re.escape(one.to)}: cannot be read: .*"):
        one.publish()
