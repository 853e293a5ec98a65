"""Sections of `cvt-label benchmark publish`: one publication, and the check of a table.

A publication has a process of its own, so the peak of the process is that of the publication.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from threading import Event, Thread
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.benchmarks.sections import CheckError, Report, Row, memory_mb, run_as_section
from jobs.benchmarks.synthetic_labels import SyntheticLabels, portions
from pipeline.commit import Partition
from pipeline.predictions import LABEL_SCHEMA, prediction_path
from pipeline.publish import publish_labels
from pipeline.storage import Storage, read_table

_SAMPLE_S = 0.005
#: Imported before the measurement: packages that a publication imports.
_LIBRARIES = {"delta": ["deltalake"], "iceberg": ["pyiceberg.catalog.sql", "pyiceberg.io.pyarrow"]}
_PUBLISHERS = ("/deltalake/", "/pyiceberg/", "/pipeline/publish/delta.py", "/pipeline/publish/iceberg.py")
#: Bytes in memory of a row without embedding, roughly, and of the rows that are checked at once.
_ROW_BYTES, _CHECKED_BYTES = 400, 10**9


def measure_publication(settings: Row, report: Report) -> None:
    """Publishes once and reports time, memory, and the fractions of time in reading, sorting and the library.

    Settings: `partition`, `to`, `rebuild`, `memory` in bytes.
    """
    for name in _LIBRARIES[settings["to"].partition(":")[0]]:
        importlib.import_module(name)
    before, start, cpu = memory_mb(reset=True), time.perf_counter(), time.process_time()
    with _sampled() as seconds:
        done = publish_labels(
            Partition.open(Storage(), settings["partition"]),
            settings["to"],
            rebuild=settings["rebuild"],
            memory_bytes=settings["memory"],
        )
    duration, total = time.perf_counter() - start, sum(seconds.values())
    report(
        {
            "rows_written": pc.sum(done.added["rows"]).as_py() or 0,
            "seconds": round(duration, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "memory_mb": memory_mb() - before,
            "imports_mb": before,
            **{name: round(seconds[name] / total, 2) for name in ("library", "reading", "sorting")},
            "published_at": done.published_at and done.published_at.isoformat(),
        }
    )


@contextmanager
def _sampled() -> Iterator[dict[str, float]]:
    """Yields the seconds of the block by activity, from the stacks of all threads every few milliseconds.

    Time in which rows are read or sorted while the library writes other rows counts as reading or sorting.
    """
    seconds, stop = defaultdict[str, float](float), Event()

    def sample() -> None:
        last = time.perf_counter()
        while not stop.wait(_SAMPLE_S):
            now = time.perf_counter()
            seconds[_activity()] += now - last  # a sample is late if a library holds the interpreter lock
            last = now

    thread = Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seconds
    finally:
        stop.set()
        thread.join()


def _activity() -> str:
    found = set[str]()
    for stack in sys._current_frames().values():
        frame: Any = stack
        while frame is not None:
            code = frame.f_code
            if code.co_name in ("read_sorted_rows", "_concat_sorted"):
                found.add(code.co_name)
            elif any(part in code.co_filename for part in _PUBLISHERS):
                found.add("library")
            frame = frame.f_back
    names = {"_concat_sorted": "sorting", "read_sorted_rows": "reading", "library": "library"}
    return next((name for function, name in names.items() if function in found), "other")


def check_table(settings: Row, report: Report) -> None:
    """Compares all rows of a table with the prediction files, and reports its files.

    Settings: `partition`, `to`, `rows` of a shard, `embedding`; `published`, for each shard, its `run` and,
    as `at`, its `published_at`.

    Raises:
        CheckError: the table has other rows than the prediction files.
    """
    kind, _, name = settings["to"].partition(":")
    table = _Delta(name) if kind == "delta" else _Iceberg(name)
    count, shards = settings["rows"], len(settings["published"])
    if (found := table.count()) != count * shards:
        raise CheckError(f"{settings['to']} has {found:,} rows, expected {count * shards:,}")
    at_once = max(1, _CHECKED_BYTES // (count * (_ROW_BYTES + 12 * settings["embedding"])))
    for numbers in portions(shards, at_once):
        expected = _expected_rows(settings, numbers)
        first, last = (expected["shard"][i].as_py() for i in (0, -1))
        rows = pa.table(table.read(first, last)).select(LABEL_SCHEMA.names).cast(LABEL_SCHEMA)
        rows = rows.take(pc.sort_indices(rows, sort_keys=[("shard", "ascending"), ("index", "ascending")]))
        for column in LABEL_SCHEMA:
            if not rows[column.name].equals(expected[column.name]):
                raise CheckError(f"{settings['to']} has other values of {column.name} than the predictions")
    sizes = table.file_sizes()
    report({"files": len(sizes), "table_mb": round(sum(sizes) / 1e6, 2), "rows_checked": count * shards})


def _expected_rows(settings: Row, numbers: range) -> pa.Table:
    """Returns the rows of shards, from their prediction files, in the order of shards and samples."""
    storage, partition = Storage(), settings["partition"]
    labels = SyntheticLabels(partition, settings["rows"], settings["embedding"])
    tables = []
    for number in numbers:
        uri = f"{partition}/predictions/{prediction_path(labels.shard(number))}"
        info = storage.stat(uri)
        with storage.open(uri, info.version) as file:
            rows = read_table(file)
        published = settings["published"][number]
        constants = {
            "model": partition.rpartition("model=")[2],
            "source": partition,
            "output_version": info.version,
            "run": published["run"],
            "published_at": datetime.fromisoformat(published["at"]),
        }
        columns = []
        for field in LABEL_SCHEMA:
            if field.name in rows.column_names:
                columns.append(rows[field.name].cast(field.type))
            else:
                columns.append(pa.repeat(pa.scalar(constants.get(field.name), field.type), len(rows)))
        tables.append(pa.table(columns, schema=LABEL_SCHEMA))
    return pa.concat_tables(tables)


class _Delta:
    def __init__(self, uri: str) -> None:
        import deltalake

        self._table = deltalake.DeltaTable(uri, storage_options=Storage().object_store_options(uri))

    def count(self) -> int:
        return int(self._table.count())

    def read(self, first: str, last: str) -> Any:
        from deltalake import QueryBuilder

        query = f"SELECT * FROM labels WHERE shard BETWEEN '{first}' AND '{last}'"
        return QueryBuilder().register("labels", self._table).execute(query).read_all()

    def file_sizes(self) -> list[int]:
        actions = pa.table(self._table.get_add_actions(flatten=True))
        return list(actions["size_bytes"].to_pylist())


class _Iceberg:
    def __init__(self, name: str) -> None:
        from pyiceberg.catalog import load_catalog

        catalog, _, identifier = name.partition(".")
        self._table = load_catalog(catalog).load_table(identifier)

    def count(self) -> int:
        return int(self._table.scan().count())

    def read(self, first: str, last: str) -> Any:
        from pyiceberg.expressions import And, GreaterThanOrEqual, LessThanOrEqual

        condition = And(GreaterThanOrEqual("shard", first), LessThanOrEqual("shard", last))
        return self._table.scan(condition).to_arrow()

    def file_sizes(self) -> list[int]:
        return list(self._table.inspect.files()["file_size_in_bytes"].to_pylist())


if __name__ == "__main__":
    run_as_section({"publish": measure_publication, "check": check_table})
