"""`read_sorted_rows`: tables of bounded size with the columns of a consumer table."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from pipeline.predictions import LABEL_SCHEMA
from pipeline.publish.rows import read_sorted_rows
from tests.pipeline.publish.tables import Dataset, sorted_rows

CONSTANTS: dict[str, Any] = {"model": "m", "source": "s", "published_at": datetime(2026, 1, 1, tzinfo=UTC)}


@pytest.fixture
def dataset(tmp_path: Any) -> Dataset:
    return Dataset(str(tmp_path))


def read(dataset: Dataset, table_bytes: int = 1_000_000, **constants: Any) -> list[pa.Table]:
    """Reads all rows of a dataset."""
    shards = dataset.partition.manifest.labeled(("uri", "rows", "output", "output_version", "run"))
    return list(read_sorted_rows(dataset.partition, shards, CONSTANTS | constants, table_bytes))


def test_table_has_the_sorted_rows_of_several_shards(dataset: Dataset) -> None:
    dataset.label(a=20, b=20)
    [table] = read(dataset)
    assert table.schema == LABEL_SCHEMA
    keys = [(row["label"] or "~", row["score"] or 2, row["shard"], row["index"]) for row in table.to_pylist()]
    assert keys == sorted(keys)
    assert len({*table["shard"].to_pylist()[:10]}) == 2


def test_tables_have_successive_shards_and_a_bounded_size(dataset: Dataset) -> None:
    counts = {f"s{number:02d}": 30 for number in range(10)}
    dataset.label(**counts)
    size = sum(table.nbytes for table in read(dataset)) // 10
    tables = read(dataset, 3 * size + size // 2)
    found = [sorted({*table["shard"].to_pylist()}) for table in tables]
    assert [shard for shards in found for shard in shards] == [dataset.shard(name) for name in counts]
    assert [len(shards) for shards in found] == [3, 3, 3, 1]
    names = [name for name in LABEL_SCHEMA.names if name not in {*CONSTANTS, "output_version", "run"}]
    assert sorted_rows(table.select(names) for table in tables) == dataset.labels()


def test_shard_over_the_size_is_a_table_of_its_own(dataset: Dataset) -> None:
    dataset.label(a=3, b=4, c=5)
    assert [len(table) for table in read(dataset, 1)] == [3, 4, 5]


def test_size_of_tables_has_a_maximum(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow cannot sort a column of strings over 2 GiB."""
    monkeypatch.setattr("pipeline.publish.rows._MAX_TABLE_BYTES", 1)
    dataset.label(a=3, b=4)
    assert [len(table) for table in read(dataset, 64 * 1024**3)] == [3, 4]


def test_constants_replace_columns(dataset: Dataset) -> None:
    dataset.embedding = "float16"
    dataset.label(a=3)
    [with_embedding], [without] = read(dataset), read(dataset, embedding=None)
    assert with_embedding["embedding"].null_count == 1
    assert without["embedding"].null_count == 3
    for name, value in CONSTANTS.items():
        assert with_embedding[name].to_pylist() == [value] * 3


def test_partition_without_shards_has_no_tables(dataset: Dataset) -> None:
    dataset.label(a=0)
    assert read(dataset) == []
