"""Filters over a Delta table as its readers ask them: the log's statistics must never hide a row."""

from __future__ import annotations

import operator
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline.config import Selection
from pipeline.publish import delta_table
from tests.makers import make_tar
from tests.pipeline.crashing import leave_out_ray
from tests.pipeline.publish.publishing_runs import NEEDS_DELTALAKE, Place, Rows

pytestmark = NEEDS_DELTALAKE

SAMPLE = Path(__file__).parents[3] / "jobs" / "data" / "fashion-mnist" / "test-0000.tar"
#: Two or three shards make a file.
SMALL_FILES = 2500
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {"=": operator.eq, "<": operator.lt, ">": operator.gt}
#: Longer than Parquet has bounds of; with a beginning that others share; beyond ASCII, and at the end of it.
KEYS = ["x" * 5000, "x" * 300 + "y", "é", "\U0001f600" * 1500, "\ud7ff" * 300, "\U0010ffff" * 1400]
Filter = tuple[str, str, Any]


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    with tarfile.open(SAMPLE) as tar:
        members = tar.getmembers()[:60]
        return [tar.extractfile(m).read() for m in members if m.name.endswith(".png")]  # type: ignore[union-attr]


def _shard(images: list[bytes], *keys: str) -> bytes:
    return make_tar([(f"{key}.png", image) for key, image in zip(keys, images, strict=False)])


@pytest.fixture
def place(tmp_path: Path, images: list[bytes], monkeypatch: pytest.MonkeyPatch) -> Place:
    """Labels of a table of several files; one of them has nothing but errors, none has targets."""
    leave_out_ray(monkeypatch)
    place = Place(str(tmp_path), "delta")
    place.put(
        {
            "a.tar": _shard(images, "ok", "z0", "a"),
            "b.tar": _shard(images[3:], *KEYS[:3]),
            "c.tar": _shard(images[6:], *KEYS[3:]),
            "d.tar": make_tar([("bad.png", b"none"), ("worse.png", b"")]),
            "e.tar": make_tar([("p.png", images[10]), ("q.png", b"none")]),
        }
    )
    place.label()
    return place


def _filters(rows: Rows) -> Iterator[Filter]:
    """Of each column that is no list, what there is and what isn't."""
    for column in delta_table._STATISTICS:
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


def _by_dataset(place: Place, wanted: Filter) -> int:
    return place.delta().to_pyarrow_dataset().count_rows(filter=_as_arrow(wanted))


def _by_pandas(place: Place, wanted: Filter) -> int:
    return len(place.delta().to_pandas(columns=["key"], filters=_as_arrow(wanted)))


def _by_duckdb(place: Place, wanted: Filter) -> int:
    import duckdb

    labels = place.delta().to_pyarrow_dataset()  # noqa: F841 - DuckDB finds it by its name
    column, name, value = wanted
    question = f'SELECT count(*) FROM labels WHERE "{column}" {name} ' + ("NULL" if value is None else "$1")
    [(count,)] = duckdb.sql(question, params=[] if value is None else [value]).fetchall()
    return int(count)


def _by_polars(place: Place, wanted: Filter) -> int:
    import polars as pl

    column, name, value = wanted
    field = pl.col(column)
    if value is None:
        asked = field.is_null() if name == "is" else field.is_not_null()
    else:
        asked = COMPARISONS[name](field, value)
    return len(pl.scan_delta(f"{place.root}/table").filter(asked).select("key").collect())


READERS = {"pandas": _by_pandas, "duckdb": _by_duckdb, "polars": _by_polars}


def _assert_right(place: Place, *packages: str) -> None:
    """As those of these readers give it that are installed, and pyarrow's datasets."""
    rows = [row for table in place._delta(None) for row in table.drop_columns(["embedding"]).to_pylist()]
    assert [row["key"] for row in place.predictions()] == [
        row["key"] for row in sorted(rows, key=lambda row: (row["shard"], row["index"]))
    ]
    for wanted in _filters(rows):
        truth = _truth(rows, wanted)
        assert _by_dataset(place, wanted) == truth, wanted
        for package in packages:
            assert READERS[package](place, wanted) == truth, (package, wanted)


@pytest.mark.parametrize("package", READERS)
def test_every_reader_finds_every_row_by_every_column(place: Place, package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed: cvt-label[consumers]")
    assert len(place.publish(file_bytes=SMALL_FILES).snapshot.files) > 2
    _assert_right(place, package)


def test_rows_are_found_after_an_update_a_compaction_and_a_vacuum(place: Place, images: list[bytes]) -> None:
    place.publish(file_bytes=SMALL_FILES)
    place.put({"a.tar": _shard(images[12:], "ö" * 3000, "n")}, remove=("e.tar",))
    place.label(Selection(prune=True))
    place.publish(file_bytes=SMALL_FILES)
    _assert_right(place)
    place.delta().optimize.compact()
    place.delta().vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    assert len(place.delta().file_uris()) == 1
    _assert_right(place)
    place.put({"f.tar": _shard(images[15:], "\U0001f600")})
    place.label()
    place.publish(file_bytes=SMALL_FILES)
    _assert_right(place)


def test_a_table_whose_log_lacks_statistics_gets_them(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nothing else is new, and each file stays what and where it is."""
    with monkeypatch.context() as patch:
        patch.setattr(delta_table, "_STATISTICS", ("shard", "label", "published"))
        place.publish(file_bytes=SMALL_FILES)
    assert _by_dataset(place, ("key", "=", "ok")) == 0  # what deltalake makes of a bound that is missing
    files = sorted(place.delta().file_uris())
    assert not place.publish(file_bytes=SMALL_FILES).is_new
    assert sorted(place.delta().file_uris()) == files
    assert place.delta().version() == 1
    _assert_right(place)
    place.publish(file_bytes=SMALL_FILES)
    assert place.delta().version() == 1


@pytest.mark.parametrize("values", [["x" * 5000, "x" * 256 + "y"], KEYS, ["\U0010ffff" * 300], [None, None]])
def test_shortened_bounds_hold(tmp_path: Path, values: list[str | None]) -> None:
    rows = pa.table({name: pa.array(values, pa.string()) for name in delta_table._STATISTICS})
    pq.write_table(rows, tmp_path / "rows.parquet")
    found = delta_table._statistics(pq.ParquetFile(tmp_path / "rows.parquet"))
    assert found["nullCount"]["key"] == values.count(None)
    if values[0] is None:
        assert found["minValues"] == found["maxValues"] == {}
        return
    low, high = found["minValues"]["key"], found["maxValues"]["key"]
    assert pc.all(pc.and_(pc.greater_equal(rows["key"], low), pc.less_equal(rows["key"], high))).as_py()
    assert len(low) <= 256
    assert len(high) <= 256 or set(high) == {"\U0010ffff"}
