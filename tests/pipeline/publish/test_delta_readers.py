"""Filters over a Delta table as its readers ask them: the log's statistics must never hide a row."""

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

#: Two or three shards make a file.
SMALL_FILES = 1000
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {"=": operator.eq, "<": operator.lt, ">": operator.gt}
#: Longer than Parquet has bounds of; with a beginning that others share; beyond ASCII, and at the end of it.
KEYS = ["x" * 5000, "x" * 300 + "y", "é", "\U0001f600" * 1500, "\ud7ff" * 300, "\U0010ffff" * 1400]
Filter = tuple[str, str, Any]


def _shard(dataset: Dataset, name: str, *keys: str) -> pa.Table:
    """Predictions of these keys."""
    rows = predictions(dataset.shard(name), len(keys), seed=len(name) + len(keys))
    return rows.set_column(1, rows.schema.field(1), pa.array(keys))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Labels of a table of several files; one of them has nothing but errors, none has targets."""
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
    """Of each column that is no list, what there is and what isn't."""
    for column in (field.name for field in SCHEMA if not pa.types.is_list(field.type)):
        values = sorted({row[column] for row in rows if row[column] is not None})
        yield column, "is", None
        yield column, "is not", None
        for value in dict.fromkeys(values[:: max(1, len(values) // 3)] + values[-1:]):
            yield from ((column, name, value) for name in COMPARISONS)
    yield from (("key", "=", key) for key in KEYS)


def _truth(rows: Rows, wanted: Filter) -> int:
    column, name, value = wanted
    if value is None:
        return sum((row[column] is None) == (name == "is") for row in rows)
    return sum(row[column] is not None and bool(COMPARISONS[name](row[column], value)) for row in rows)


def _as_arrow(wanted: Filter) -> ds.Expression:
    column, name, value = wanted
    if value is None:
        return ds.field(column).is_null() if name == "is" else ds.field(column).is_valid()
    return COMPARISONS[name](ds.field(column), value)


def _by_dataset(dataset: Dataset, wanted: Filter) -> int:
    return dataset.delta().to_pyarrow_dataset().count_rows(filter=_as_arrow(wanted))


def _by_pandas(dataset: Dataset, wanted: Filter) -> int:
    return len(dataset.delta().to_pandas(columns=["key"], filters=_as_arrow(wanted)))


def _by_duckdb(dataset: Dataset, wanted: Filter) -> int:
    import duckdb

    labels = dataset.delta().to_pyarrow_dataset()  # noqa: F841 - DuckDB finds it by its name
    column, name, value = wanted
    question = f'SELECT count(*) FROM labels WHERE "{column}" {name} ' + ("NULL" if value is None else "$1")
    [(count,)] = duckdb.sql(question, params=[] if value is None else [value]).fetchall()
    return int(count)


def _by_polars(dataset: Dataset, wanted: Filter) -> int:
    import polars as pl

    column, name, value = wanted
    field = pl.col(column)
    if value is None:
        asked = field.is_null() if name == "is" else field.is_not_null()
    else:
        asked = COMPARISONS[name](field, value)
    return len(pl.scan_delta(dataset.table).filter(asked).select("key").collect())


READERS = {"pandas": _by_pandas, "duckdb": _by_duckdb, "polars": _by_polars}


def _assert_right(dataset: Dataset, *packages: str) -> None:
    """As those of these readers give it that are installed, and pyarrow's datasets."""
    assert dataset.published() == dataset.labels()
    rows = dataset.delta().to_pyarrow_table().drop_columns(["embedding", "model"]).to_pylist()
    for wanted in _filters(rows):
        truth = _truth(rows, wanted)
        assert _by_dataset(dataset, wanted) == truth, wanted
        for package in packages:
            assert READERS[package](dataset, wanted) == truth, (package, wanted)


@pytest.mark.parametrize("package", READERS)
def test_every_reader_finds_every_row_by_every_column(dataset: Dataset, package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed: cvt-label[consumers]")
    assert len(dataset.publish(file_bytes=SMALL_FILES).snapshot.files) > 2
    _assert_right(dataset, package)


def test_rows_are_found_after_an_update_a_compaction_and_a_vacuum(dataset: Dataset) -> None:
    dataset.publish(file_bytes=SMALL_FILES)
    dataset.label(_shard(dataset, "a", "ö" * 3000, "n"), remove=["e"])
    dataset.publish(file_bytes=SMALL_FILES)
    _assert_right(dataset)
    dataset.delta().optimize.compact()
    dataset.delta().vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    assert len(dataset.delta().file_uris()) == 1
    _assert_right(dataset)
    dataset.label(_shard(dataset, "f", "\U0001f600"))
    dataset.publish(file_bytes=SMALL_FILES)
    _assert_right(dataset)
