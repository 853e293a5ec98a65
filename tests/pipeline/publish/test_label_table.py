"""The contract of `LabelTable`, for both formats: what is published, and transactions that replace rows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pyarrow as pa
import pytest

from pipeline.predictions import LABEL_SCHEMA
from pipeline.publish.delta import DeltaTable
from pipeline.publish.iceberg import IcebergTable
from pipeline.publish.label_table import (
    PUBLISHED_SCHEMA,
    TOKEN_KEY,
    Increment,
    LabelTable,
    TableChangedError,
)
from pipeline.storage import StorageError
from tests.pipeline.publish.tables import Dataset

NOW = datetime(2026, 12, 1, 10, 30, 0, 123456, tzinfo=UTC)


def open_table(dataset: Dataset, model: str = "m") -> LabelTable:
    """Opens the dataset's table for a model."""
    kind, _, name = dataset.to.partition(":")
    return DeltaTable(dataset.storage, name, model) if kind == "delta" else IcebergTable(name, model)


def make_rows(
    *shards: str, model: str = "m", source: str = "s", version: str = "v", rows: int = 1
) -> pa.Table:
    """Makes rows of shards, sorted by shard."""
    names = [shard for shard in shards for _ in range(rows)]
    constants = {"model": model, "source": source, "output_version": version, "run": "r", "published_at": NOW}
    columns = [
        pa.array(names)
        if field.name == "shard"
        else pa.repeat(pa.scalar(constants.get(field.name), field.type), len(names))
        for field in LABEL_SCHEMA
    ]
    return pa.table(columns, schema=LABEL_SCHEMA)


def published(table: LabelTable) -> list[tuple[str, str, str, int]]:
    """Returns the sorted rows of `read_published`."""
    found = table.read_published()
    assert found.schema == PUBLISHED_SCHEMA
    return sorted(tuple(row.values()) for row in found.to_pylist())


def test_opening_creates_an_empty_table(local: Dataset) -> None:
    table = open_table(local)
    assert table.name == local.to
    assert published(table) == []
    assert table.version == local.version()
    assert not local.version()
    assert open_table(local).version == table.version


def test_published_shards_are_counted_by_source_and_version(local: Dataset) -> None:
    table = open_table(local)
    rows = [make_rows("a", "b", rows=3), make_rows("b", version="w"), make_rows("b", source="t", rows=2)]
    version = table.commit(Increment(rows, NOW, "shard", []))
    assert version == local.version()
    expected = [("a", "s", "v", 3), ("b", "s", "v", 3), ("b", "s", "w", 1), ("b", "t", "v", 2)]
    assert published(open_table(local)) == expected
    assert published(open_table(local, "other")) == []


def test_commit_adds_rows_of_several_tables_and_removes_others(local: Dataset) -> None:
    open_table(local).commit(Increment([make_rows("a", "b"), make_rows("c", "d")], NOW, "shard", []))
    open_table(local, "o").commit(Increment([make_rows("a", model="o")], NOW, "shard", []))
    later = NOW.replace(microsecond=1)
    rows = make_rows("b", "n", version="w").set_column(
        LABEL_SCHEMA.get_field_index("published_at"),
        LABEL_SCHEMA.field("published_at"),
        pa.repeat(pa.scalar(later, pa.timestamp("us", "UTC")), 2),
    )
    open_table(local).commit(Increment([rows], later, "shard", ["b", "c", "unknown"]))
    expected = [("a", "s", "v", 1), ("b", "s", "w", 1), ("d", "s", "v", 1), ("n", "s", "w", 1)]
    assert published(open_table(local)) == expected
    open_table(local).commit(Increment([], later, "source", ["s"]))
    assert published(open_table(local)) == []
    assert published(open_table(local, "o")) == [("a", "s", "v", 1)]


def test_commit_has_its_token_in_the_history(local: Dataset) -> None:
    increment = Increment([make_rows("a")], NOW, "shard", [])
    open_table(local).commit(increment)
    if local.format == "delta":
        assert local.delta().history(1)[0][TOKEN_KEY] == increment.token
    else:
        assert local.iceberg().current_snapshot().summary[TOKEN_KEY] == increment.token
    assert increment.token != Increment([], NOW, "shard", []).token


@pytest.mark.parametrize("removed", [[], ["a"]], ids=["append", "overwrite"])
def test_commit_after_another_of_the_model_is_refused(local: Dataset, removed: list[str]) -> None:
    open_table(local).commit(Increment([make_rows("a")], NOW, "shard", []))
    one, two = open_table(local), open_table(local)
    one.commit(Increment([make_rows("x")], NOW, "shard", []))
    with pytest.raises(TableChangedError, match="another writer committed first"):
        two.commit(Increment([make_rows("x")], NOW, "shard", removed))
    assert published(open_table(local)) == [("a", "s", "v", 1), ("x", "s", "v", 1)]
    assert published(two) == published(open_table(local))  # opened at the new version


@pytest.mark.parametrize("removed", [[], ["a"]], ids=["append", "overwrite"])
def test_commit_after_another_of_another_model_succeeds(local: Dataset, removed: list[str]) -> None:
    open_table(local).commit(Increment([make_rows("a")], NOW, "shard", []))
    one, two = open_table(local), open_table(local, "o")
    two.commit(Increment([make_rows("a", model="o")], NOW, "shard", removed))
    one.commit(Increment([make_rows("x")], NOW.replace(year=2027), "shard", []))
    assert published(open_table(local)) == [("a", "s", "v", 1), ("x", "s", "v", 1)]
    assert published(open_table(local, "o")) == [("a", "s", "v", 1)]


def test_error_of_the_rows_is_raised_and_nothing_is_committed(local: Dataset) -> None:
    def rows() -> Iterator[pa.Table]:
        yield make_rows("a")
        raise StorageError("s3://b/x", "access denied")

    table = open_table(local)
    before = local.version()
    with pytest.raises(StorageError, match=r"^s3://b/x: access denied$"):
        table.commit(Increment(rows(), NOW, "shard", []))
    assert local.version() == before
    assert published(open_table(local)) == []


def test_many_removed_shards_fit_into_a_transaction(local: Dataset) -> None:
    """The names are as long as those of shards in a bucket."""
    names = [f"s3://a-bucket/a/long/prefix/it's/{number:08d}.tar" for number in range(10_000)]
    kept = "s3://a-bucket/z.tar"
    open_table(local).commit(Increment([make_rows(*names), make_rows(kept)], NOW, "shard", []))
    open_table(local).commit(Increment([], NOW.replace(year=2027), "shard", names))
    assert published(open_table(local)) == [(kept, "s", "v", 1)]


@pytest.mark.parametrize(
    "name",
    [
        "it's",
        "a b",
        "100 %",
        "%20",
        "ü/ö",
        "a=b",
        "a#b",
        "a?b:c",
        "[x]|^",
        "a'; DROP TABLE labels; --",
        "日本",
        "\\",
    ],
)
def test_model_and_shards_may_have_any_name(local: Dataset, name: str) -> None:
    table = open_table(local, name)
    table.commit(Increment([make_rows(name, "x", model=name, source=name, version=name)], NOW, "shard", []))
    expected = [(name, name, name, 1), ("x", name, name, 1)]
    assert published(open_table(local, name)) == sorted(expected)
    open_table(local, name).commit(Increment([], NOW.replace(year=2027), "shard", ["x"]))
    assert published(open_table(local, name)) == [(name, name, name, 1)]
    open_table(local, name).commit(Increment([], NOW.replace(year=2027), "source", [name]))
    assert published(open_table(local, name)) == []
