"""Filters of Delta readers: the statistics in the log never hide a row."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from pipeline.publish.data_files import SCHEMA
from tests.partitions import make_predictions
from tests.pipeline.publish.tables import LABELS, Dataset, Rows, needs_delta, predictions

pytestmark = pytest.mark.slow

needs_delta()

#: The size of the rows of two or three shards.
SMALL_FILES = 1000
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {"=": operator.eq, "<": operator.lt, ">": operator.gt}
#: Keys that are longer than Parquet's bounds, that share a prefix, and that have the highest code points.
KEYS = ["x" * 5000, "x" * 300 + "y", "é", "\U0001f600" * 1500, "\ud7ff" * 300, "\U0010ffff" * 1400]
Filter = tuple[str, str, Any]


def _shard(dataset: Dataset, name: str, *keys: str) -> pa.Table:
    """Makes predictions with these keys."""
    rows = predictions(dataset.shard(name), len(keys), seed=len(name) + len(keys))
    return rows.set_column(1, rows.schema.field(1), pa.array(keys))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """A dataset whose table has several files. A shard has only errors, and no sample has a target."""
    dataset = Dataset(str(tmp_path))
    dataset.label(
        _shard(dataset, "a", "ok", "z0", "a"),
        _shard(dataset, "b", *KEYS[:3]),
        _shard(dataset, "c", *KEYS[3:]),
        make_predictions(dataset.shard("d"), LABELS, [None, None]),
        _shard(dataset, "e", "p", "q"),
    )
    return dataset


def _filters(rows: Rows) -> Iterator[Filter]:
    """Yields filters for each column that is not a list, on values and on null."""
    for column in (field.name for field in SCHEMA if not pa.types.is_list(field.type)):
        values = sorted({row[column] for row in rows if row[column] is not None})
        yield column, "is", None
        yield column, "is not", None
        for value in dict.fromkeys(values[:: max(1, len(values) // 3)] + values[-1:]):
            yield from ((column, name, value) for name in COMPARISONS)
    yield from (("key", "=", key) for key in KEYS)


def _expected_count(rows: Rows, row_filter: Filter) -> int:
    column, name, value = row_filter
    if value is None:
        return sum((row[column] is None) == (name == "is") for row in rows)
    return sum(row[column] is not None and bool(COMPARISONS[name](row[column], value)) for row in rows)


def _as_arrow(row_filter: Filter) -> ds.Expression:
    column, name, value = row_filter
    if value is None:
        return ds.field(column).is_null() if name == "is" else ds.field(column).is_valid()
    return COMPARISONS[name](ds.field(column), value)


def _by_dataset(dataset: Dataset, row_filter: Filter) -> int:
    return dataset.delta().to_pyarrow_dataset().count_rows(filter=_as_arrow(row_filter))


def _by_pandas(dataset: Dataset, row_filter: Filter) -> int:
    return len(dataset.delta().to_pandas(columns=["key"], filters=_as_arrow(row_filter)))


def _by_duckdb(dataset: Dataset, row_filter: Filter) -> int:
    import duckdb

    labels = dataset.delta().to_pyarrow_dataset()  # noqa: F841 - DuckDB finds the variable by its name
    column, name, value = row_filter
    query = f'SELECT count(*) FROM labels WHERE "{column}" {name} ' + ("NULL" if value is None else "$1")
    [(count,)] = duckdb.sql(query, params=[] if value is None else [value]).fetchall()
    return int(count)


def _by_polars(dataset: Dataset, row_filter: Filter) -> int:
    import polars as pl

    column, name, value = row_filter
    field = pl.col(column)
    if value is None:
        condition = field.is_null() if name == "is" else field.is_not_null()
    else:
        condition = COMPARISONS[name](field, value)
    return len(pl.scan_delta(dataset.table).filter(condition).select("key").collect())


READERS = {"pandas": _by_pandas, "duckdb": _by_duckdb, "polars": _by_polars}


def _assert_counts(dataset: Dataset, *packages: str) -> None:
    """Compares the counts of pyarrow's datasets and of the given readers with the expected counts."""
    assert dataset.published() == dataset.labels()
    rows = dataset.delta().to_pyarrow_table().drop_columns(["embedding", "model"]).to_pylist()
    for row_filter in _filters(rows):
        expected = _expected_count(rows, row_filter)
        assert _by_dataset(dataset, row_filter) == expected, row_filter
        for package in packages:
            assert READERS[package](dataset, row_filter) == expected, (package, row_filter)


@pytest.mark.parametrize("package", READERS)
def test_every_reader_finds_every_row_by_every_column(dataset: Dataset, package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed: cvt-label[consumers]")
    assert len(dataset.publish(file_bytes=SMALL_FILES).snapshot.files) > 2
    _assert_counts(dataset, package)


def test_rows_are_found_after_update_compaction_and_vacuum(dataset: Dataset) -> None:
    dataset.publish(file_bytes=SMALL_FILES)
    dataset.label(_shard(dataset, "a", "ö" * 3000, "n"), remove=["e"])
    dataset.publish(file_bytes=SMALL_FILES)
    _assert_counts(dataset)
    dataset.delta().optimize.compact()
    dataset.delta().vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    assert len(dataset.delta().file_uris()) == 1
    _assert_counts(dataset)
    dataset.label(_shard(dataset, "f", "\U0001f600"))
    dataset.publish(file_bytes=SMALL_FILES)
    _assert_counts(dataset)
