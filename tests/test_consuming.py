"""Labels as other programs read them: the properties of the Parquet files that readers rely on."""

from __future__ import annotations

import io
import re
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline import predictions
from pipeline.predictions import Footer, encode_predictions, prediction_schema, serialize_table
from pipeline.statistics import ClassStatistics
from tests.docs.example_labels import ExampleLabels


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> ExampleLabels:
    return ExampleLabels(tmp_path_factory.mktemp("consumer"), "float16")


@pytest.mark.parametrize("package", ["pyarrow", "duckdb", "polars", "pandas"])
def test_glob_over_partitions_reads_every_row_with_its_model(labels: ExampleLabels, package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed: cvt-label[consumers]")
    pattern = f"{labels.folder}/labels/model=*/predictions/**/*.parquet"
    columns = ["model", "shard", "index", "score"]
    if package == "pyarrow":
        files = [str(path) for path in labels.files]
        rows = ds.dataset(files, partitioning="hive").to_table(columns=columns).to_pylist()
    elif package == "duckdb":
        import duckdb

        source = "read_parquet($1, hive_partitioning = true, union_by_name = true)"
        query = f'SELECT model, shard, "index", score FROM {source}'
        relation = duckdb.sql(query, params=[pattern])
        assert relation is not None
        rows = relation.to_arrow_table().to_pylist()
    elif package == "polars":
        import polars

        frame = polars.scan_parquet(
            pattern, hive_partitioning=True, missing_columns="insert", extra_columns="ignore"
        )
        rows = frame.select(columns).collect().to_dicts()
    else:
        import pandas

        frame = pandas.read_parquet(labels.files, columns=columns, partitioning="hive")
        rows = pa.Table.from_pandas(frame, preserve_index=False).to_pylist()
    key = [(row["model"], row["shard"], row["index"], row["score"]) for row in labels.rows]
    assert sorted((r["model"], r["shard"], r["index"], r["score"] or -1) for r in rows) == sorted(
        (*rest, score or -1) for *rest, score in key
    )


def test_files_of_one_model_have_the_same_columns(labels: ExampleLabels) -> None:
    """Shards with targets, without targets, and with errors only."""
    for folder in labels.folder.glob("labels/model=*/predictions"):
        schemas = [pq.read_schema(path).remove_metadata() for path in sorted(folder.rglob("*.parquet"))]
        assert len(schemas) == 4
        assert all(schema.equals(schemas[0]) for schema in schemas)


@pytest.mark.parametrize("folder", ["labels", "table"])
def test_column_types_and_names_are_readable_by_spark(labels: ExampleLabels, folder: str) -> None:
    """By Spark's ParquetToSparkSchemaConverter and its rules for column names."""
    files = labels.files if folder == "labels" else sorted(labels.folder.glob("table/model=*/*.parquet"))
    if folder == "table":
        pytest.importorskip("deltalake", reason="deltalake is not installed: cvt-label[delta]")
    assert len(files) >= 2
    for path in files:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        assert len({name.lower() for name in names}) == len(names)
        assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in names)
        for number in range(len(file.schema)):
            column = file.schema.column(number)
            if folder == "labels" and column.path == "embedding.list.element":
                continue  # half precision, which Spark does not read: docs/how-to/read-labels.md
            assert column.physical_type in {"INT32", "INT64", "FLOAT", "BYTE_ARRAY"}
            if column.name == "published_at":
                assert "isAdjustedToUTC=true, timeUnit=microseconds" in str(column.logical_type)
            else:
                assert column.logical_type.type in {"NONE", "STRING", "INT"}
            assert "isSigned=false" not in str(column.logical_type)
            assert column.path == column.name or column.path.endswith(".list.element")


def _predictions(rows: int) -> pa.Table:
    """Predictions of a shard whose images are ordered by class."""
    schema = prediction_schema()
    numbers = range(rows)
    columns: dict[str, Any] = {
        "shard": ["s"] * rows,
        "key": [str(i) for i in numbers],
        "index": list(numbers),
        "label": [f"class {i * 10 // rows}" for i in numbers],
        "label_id": [i * 10 // rows for i in numbers],
        "score": [0.5 + i / rows / 2 for i in numbers],
        "topk_label_ids": [[i * 10 // rows] for i in numbers],
        "topk_scores": [[0.5] for _ in numbers],
        "entropy": [0.1] * rows,
    }
    return pa.table([pa.array(columns.get(f.name, [None] * rows), f.type) for f in schema], schema=schema)


def test_row_groups_have_statistics_of_labels_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "ROW_GROUP_ROWS", 100)
    rows = _predictions(1000)
    partial = ClassStatistics.from_predictions(rows, 10).to_partial()
    footer = Footer("s", "v", "webdataset", 1, "f", 1000, 0, 0, 0, serialize_table(partial))
    data = encode_predictions(rows, footer)
    assert data == encode_predictions(rows, footer)
    file = pq.ParquetFile(io.BytesIO(data))
    names = file.schema_arrow.names
    for number in range(10):
        group = file.metadata.row_group(number)
        label, score = (group.column(names.index(name)) for name in ("label", "score"))
        assert (label.statistics.min, label.statistics.max) == (f"class {number}", f"class {number}")
        assert score.statistics.min >= 0.5 + number / 20 - 1e-6
        assert label.has_column_index
        assert score.has_offset_index
    dataset = ds.ParquetFileFormat().make_fragment(pa.BufferReader(data))
    assert len(dataset.split_by_row_group(ds.field("label") == "class 7")) == 1
    assert len(dataset.split_by_row_group(ds.field("score") > 0.95)) == 1
