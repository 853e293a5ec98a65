"""Readers with filters find all rows: the statistics in Delta's log and in Iceberg's manifests hide none."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from pipeline.predictions import LABEL_SCHEMA
from tests.partitions import make_predictions
from tests.pipeline.publish.duckdb_extensions import connect_with_extension
from tests.pipeline.publish.tables import FORMATS, LABELS, Dataset, Rows, needs_format, predictions

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {"=": operator.eq, "<": operator.lt, ">": operator.gt}
#: Keys that are longer than the bounds of statistics, that share a prefix, and that have the highest code
#: points.
KEYS = ["x" * 5000, "x" * 300 + "y", "é", "\U0001f600" * 1500, "\ud7ff" * 300, "\U0010ffff" * 1400]
#: Keys with characters that have a meaning in paths and in SQL.
NAMES = ["it's", "a\\b", 'c"d', "a%2Fb", "../x", " ", "", "\n\t", "\x01", "\x7f"]
Filter = tuple[str, str, Any]

pytestmark = pytest.mark.slow


def _shard(dataset: Dataset, name: str, *keys: str) -> pa.Table:
    """Makes predictions with these keys."""
    rows = predictions(dataset.shard(name), len(keys), len(name) + len(keys), dataset.embedding)
    return rows.set_column(1, rows.schema.field(1), pa.array(keys))


@pytest.fixture(params=FORMATS)
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    """A dataset whose table has a file for each shard. A shard has only errors. No sample has a target."""
    needs_format(request.param)
    dataset = Dataset(str(tmp_path), format=request.param, embedding="float16")
    errors = make_predictions(dataset.shard("d"), LABELS, [None, None])
    vectors = pa.nulls(2, pa.list_(pa.float16(), 4))
    for rows in (
        _shard(dataset, "a", "ok", "z0", "a"),
        _shard(dataset, "b%2F' é", *KEYS[:3]),
        _shard(dataset, "c", *KEYS[3:], *NAMES),
        errors.append_column("embedding", vectors),
        _shard(dataset, "e", "p", "q"),
    ):
        dataset.label(rows)
        dataset.publish()
    assert len(dataset.files()) == 5
    return dataset


def _filters(rows: Rows) -> Iterator[Filter]:
    """Yields filters for each column that is not a list, on values and on null."""
    for column in (field.name for field in LABEL_SCHEMA if not pa.types.is_list(field.type)):
        values = sorted({row[column] for row in rows if row[column] is not None})
        yield column, "is", None
        yield column, "is not", None
        for value in dict.fromkeys(values[:: max(1, len(values) // 3)] + values[-1:]):
            yield from ((column, name, value) for name in COMPARISONS)
    yield from (("key", "=", key) for key in KEYS + NAMES)


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


def _as_iceberg(row_filter: Filter) -> Any:
    from pyiceberg.expressions import EqualTo, GreaterThan, IsNull, LessThan, NotNull

    column, name, value = row_filter
    if value is None:
        return IsNull(column) if name == "is" else NotNull(column)
    value = value.isoformat() if isinstance(value, datetime) else value
    return {"=": EqualTo, "<": LessThan, ">": GreaterThan}[name](column, value)


def _by_pyarrow(dataset: Dataset, row_filter: Filter) -> int:
    if dataset.format == "iceberg":
        return int(dataset.iceberg().scan(_as_iceberg(row_filter), ("key",)).to_arrow().num_rows)
    return int(dataset.delta().to_pyarrow_dataset().count_rows(filter=_as_arrow(row_filter)))


def _by_pandas(dataset: Dataset, row_filter: Filter) -> int:
    if dataset.format == "iceberg":
        return len(dataset.iceberg().scan(_as_iceberg(row_filter), ("key",)).to_pandas())
    return len(dataset.delta().to_pandas(columns=["key"], filters=_as_arrow(row_filter)))


def _by_duckdb(dataset: Dataset, row_filter: Filter) -> int:
    if dataset.format == "iceberg":
        labels = dataset.iceberg().scan(_as_iceberg(row_filter)).to_arrow()
    else:
        labels = dataset.delta().to_pyarrow_dataset()
    duckdb = importlib.import_module("duckdb")
    return _count_in_duckdb(duckdb.from_arrow(labels), row_filter)


def _by_duckdb_extension(dataset: Dataset, row_filter: Filter) -> int:
    connection = connect_with_extension(dataset.format)
    place = dataset.table if dataset.format == "delta" else dataset.iceberg().metadata_location
    return _count_in_duckdb(connection.table_function(f"{dataset.format}_scan", [place]), row_filter)


def _count_in_duckdb(labels: Any, row_filter: Filter) -> int:
    duckdb = importlib.import_module("duckdb")
    column, name, value = row_filter
    field = duckdb.ColumnExpression(column)
    if value is None:
        condition = field.isnull() if name == "is" else field.isnotnull()
    else:
        condition = COMPARISONS[name](field, duckdb.ConstantExpression(value))
    return len(labels.filter(condition).select("key").fetchall())


def _by_polars(dataset: Dataset, row_filter: Filter) -> int:
    import polars as pl

    column, name, value = row_filter
    field = pl.col(column)
    if value is None:
        condition = field.is_null() if name == "is" else field.is_not_null()
    else:
        condition = COMPARISONS[name](field, value)
    is_delta = dataset.format == "delta"
    labels = pl.scan_delta(dataset.table) if is_delta else pl.scan_iceberg(dataset.iceberg())
    return len(labels.filter(condition).select("key").collect())


READERS = {
    "pyarrow": _by_pyarrow,
    "pandas": _by_pandas,
    "duckdb": _by_duckdb,
    "duckdb extension": _by_duckdb_extension,
    "polars": _by_polars,
}


def _assert_counts(dataset: Dataset, reader: str) -> None:
    """Compares the counts of a reader with the expected counts."""
    assert dataset.published() == dataset.labels()
    rows = dataset.rows().to_pylist()
    for row_filter in _filters(rows):
        count = READERS[reader](dataset, row_filter)
        assert count == _expected_count(rows, row_filter), row_filter


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_finds_every_row_by_every_column(dataset: Dataset, reader: str) -> None:
    package = reader.partition(" ")[0]
    pytest.importorskip(package, reason=f"{package} is not installed: cvt-label[consumers]")
    _assert_counts(dataset, reader)


def test_rows_are_found_after_update_compaction_and_vacuum(dataset: Dataset) -> None:
    dataset.label(_shard(dataset, "a", "ö" * 3000, "n"), remove=["e"])
    dataset.publish()
    if dataset.format == "delta":
        dataset.delta().optimize.compact()
        dataset.delta().vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
        assert len(dataset.files()) == 1
    dataset.label(_shard(dataset, "f", "\U0001f600"))
    dataset.publish()
    _assert_counts(dataset, "pyarrow")
