"""The labels as their readers meet them: the examples of docs/consuming.md, and what else is relied on."""

from __future__ import annotations

import importlib.util
import io
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from jobs.local_s3 import LocalS3
from pipeline import predictions
from pipeline.predictions import Footer, encode_predictions, prediction_schema, serialize_statistics
from pipeline.statistics import ClassStatistics
from pipeline.storage import Storage
from tests.partitions import make_predictions
from tests.pipeline.publish import tables
from tests.pipeline.publish.tables import LABELS, Dataset

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs" / "consuming.md").read_text(), re.M | re.S)
#: By what an example imports, or is run by; what is not installed is skipped.
READERS = ("duckdb", "polars", "pandas", "deltalake", "pyspark")
NEEDS_EMBEDDING = "needs output.embedding"


class Labels:
    """A folder as the page has it: `labels` of two models, one perhaps with embeddings, and their `table`."""

    def __init__(self, folder: Path, embedding: str | None = None) -> None:
        self.folder = folder
        for seed, (model, kind) in enumerate({"one-00000001": embedding, "other-00000002": None}.items()):
            dataset = Dataset(str(folder), embedding=kind)
            dataset.uri = f"{folder}/labels/model={model}"
            dataset.label(
                _with_targets(dataset, "a.tar", 30, seed),
                tables.predictions(dataset.shard("deep/no=targets.tar"), 15, 10 + seed, kind),
            )
            self._publish(dataset)
            dataset.label(_errors(dataset, "only errors.tar"), _with_targets(dataset, "z.tar", 15, 20 + seed))
            self._publish(dataset)
        self.files = sorted(folder.glob("labels/model=*/predictions/**/*.parquet"))
        self.rows = [row for path in self.files for row in _rows(path)]

    def _publish(self, dataset: Dataset) -> None:
        if importlib.util.find_spec("deltalake"):
            dataset.publish()


def _with_targets(dataset: Dataset, name: str, count: int, seed: int) -> pa.Table:
    rows = tables.predictions(dataset.shard(name), count, seed, dataset.embedding)
    column = rows.schema.get_field_index("target_id")
    targets = pa.array([row % len(LABELS) for row in range(count)], pa.int32())
    return rows.set_column(column, rows.schema.field(column), targets)


def _errors(dataset: Dataset, name: str) -> pa.Table:
    rows = make_predictions(dataset.shard(name), LABELS, [None, None])
    rows = rows.set_column(1, rows.schema.field(1), pa.array(["../../x.jpg", "it's.jpg"]))
    if dataset.embedding is None:
        return rows
    embedding = tables.predictions("", 1, embedding=dataset.embedding).schema.field("embedding")
    return rows.append_column(embedding, pa.nulls(2, embedding.type))


def _rows(path: Path) -> list[dict[str, Any]]:
    model = str(path).partition("/model=")[2].partition("/")[0]
    return [row | {"model": model} for row in pq.read_table(path, partitioning=None).to_pylist()]


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Labels:
    return Labels(tmp_path_factory.mktemp("consumer"), "float16")


@pytest.fixture(scope="module")
def default_labels(tmp_path_factory: pytest.TempPathFactory) -> Labels:
    return Labels(tmp_path_factory.mktemp("default"))


def _needed(kind: str, code: str) -> set[str]:
    """Packages that an example needs, besides pyarrow."""
    needed = {name for name in READERS if re.search(rf"^(import|from) {name}\b", code, re.M)}
    needed |= {"deltalake"} if "scan_delta" in code else set()
    return needed | ({"duckdb"} if kind == "sql" else set())


@pytest.mark.parametrize("kept", ["labels", "default_labels"])
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_example_of_the_page_runs(
    number: int,
    kept: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With embeddings; and without, what doesn't say that it needs them."""
    labels: Labels = request.getfixturevalue(kept)
    kind, code = BLOCKS[number]
    for package in sorted(_needed(kind, code)):
        reason = f"{package} is not installed: cvt-label[consumers,delta], or pyspark, which needs Java"
        pytest.importorskip(package, reason=reason)
        if package == "pyspark" and shutil.which("java") is None:
            pytest.skip(reason)
    monkeypatch.chdir(labels.folder)
    if "my-bucket" in code:
        server: LocalS3 = request.getfixturevalue("s3_server")
        bucket = f"labels-{secrets.token_hex(4)}"
        server.create_bucket(bucket)
        for path in labels.files:
            Storage().write(f"s3://{bucket}/{path.relative_to(labels.folder)}", path.read_bytes())
        code = code.replace("my-bucket", bucket)
    if kind == "sql":
        results = _run_sql(code, without=NEEDS_EMBEDDING if kept == "default_labels" else None)
        assert all(results), code
    else:
        exec(compile(code, f"docs/consuming.md, example {number}", "exec"), {})
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_the_example_for_buckets_runs_with_an_endpoint_named_and_without(
    labels: Labels, bucket: str, s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Without one, Polars looks itself where the service is."""
    pytest.importorskip("polars", reason="polars is not installed: cvt-label[consumers]")
    for path in labels.files:
        Storage().write(f"{bucket}/{path.relative_to(labels.folder)}", path.read_bytes())
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv(variable, s3_server.endpoint_url)
    [code] = [code for _, code in BLOCKS if "s3://my-bucket" in code]
    exec(compile(code.replace("s3://my-bucket", bucket), "docs/consuming.md", "exec"), found := {})
    assert found["labels"].select("key").collect().height == len(labels.rows)


def _run_sql(code: str, without: str | None = None) -> list[list[Any]]:
    """The rows of each query, but of none that has these words."""
    import duckdb

    connection = duckdb.connect()
    answers = []
    for statement in duckdb.extract_statements(code):
        if without and without in statement.query:
            continue
        done = connection.execute(statement)
        if statement.type == duckdb.StatementType.SELECT:
            answers.append(done.fetchall())
    return answers


def test_queries_of_the_page_give_what_the_labels_are(
    labels: Labels, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("duckdb", reason="duckdb is not installed: cvt-label[consumers]")
    monkeypatch.chdir(labels.folder)
    code = next(code for kind, code in BLOCKS if kind == "sql")
    classes, unsure, errors, accuracy, disagree, alike = _run_sql(code)
    good = [row for row in labels.rows if row["error"] is None]
    assert sum(row[2] for row in classes) == len(good)
    assert [row[3] for row in unsure] == sorted(r["score"] for r in good if r["score"] < 0.6)
    assert sum(row[1] for row in errors) == len(labels.rows) - len(good) > 4
    for model, count, top1, _ in accuracy:
        known = [r for r in good if r["model"] == model and r["target_id"] is not None]
        assert count == len(known)
        assert top1 == pytest.approx(sum(r["label_id"] == r["target_id"] for r in known) / len(known))
    by_model: dict[str, dict[tuple[str, int], str]] = {}
    for row in good:
        by_model.setdefault(row["model"], {})[row["shard"], row["index"]] = row["label"]
    one, other = by_model.values()
    assert len(disagree) == sum(one[sample] != other[sample] for sample in one) > 0
    assert alike[0][3] == pytest.approx(1, abs=1e-3)
    assert len(alike) == 10


@pytest.mark.parametrize("package", ["pyarrow", "duckdb", "polars", "pandas"])
def test_a_glob_over_all_partitions_reads_every_row_with_its_model(labels: Labels, package: str) -> None:
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
        rows = duckdb.sql(query, params=[pattern]).to_arrow_table().to_pylist()
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


def test_all_files_of_a_model_have_the_same_columns(labels: Labels) -> None:
    """With targets and without, and with nothing but errors."""
    for folder in labels.folder.glob("labels/model=*/predictions"):
        schemas = [pq.read_schema(path).remove_metadata() for path in sorted(folder.rglob("*.parquet"))]
        assert len(schemas) == 4
        assert all(schema.equals(schemas[0]) for schema in schemas)


@pytest.mark.parametrize("folder", ["labels", "table"])
def test_columns_keep_to_what_spark_and_others_can_read(labels: Labels, folder: str) -> None:
    """Spark's ParquetToSparkSchemaConverter, and its rules for names of columns."""
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
                continue  # in half precision, as asked for: the page says so
            assert column.physical_type in {"INT32", "INT64", "FLOAT", "BYTE_ARRAY"}
            assert column.logical_type.type in {"NONE", "STRING", "INT"}
            assert "isSigned=false" not in str(column.logical_type)
            assert column.path == column.name or column.path.endswith(".list.element")


def _predictions(rows: int) -> pa.Table:
    """Predictions of a large shard whose images come class by class, as they often do."""
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


def test_row_groups_tell_which_labels_and_scores_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "ROW_GROUP_ROWS", 100)
    rows = _predictions(1000)
    partial = ClassStatistics.from_predictions(rows, 10).to_partial()
    footer = Footer("s", "v", "webdataset", 1, "f", 1000, 0, 0, serialize_statistics(partial))
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
