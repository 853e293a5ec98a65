"""The queries on published tables in the documentation: each returns the rows of the prediction files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.commit import Partition
from pipeline.publish import publish_labels
from pipeline.storage import Storage
from tests.docs.example_labels import MODELS, PUBLISH_PAGE, ExampleLabels
from tests.docs.pages import Block, blocks_of
from tests.pipeline.publish.duckdb_extensions import connect_with_extension
from tests.pipeline.publish.tables import FORMATS

READ_PAGE = "docs/how-to/read-tables.md"
QUERIES = blocks_of("python", page=READ_PAGE)
#: A block that names one of these packages is skipped if the package is not installed.
PACKAGES = ("duckdb", "polars", "pandas", "deltalake", "pyiceberg", "pyspark")
WIDTH = 4
Rows = list[dict[str, Any]]


def skip_unless_installed(code: str) -> None:
    for package in PACKAGES:
        if re.search(rf"\b{package}\b|\.to_{package}\(", code):
            pytest.importorskip(package, reason=f"{package} is not installed: cvt-label[consumers,delta]")
    if "pyiceberg" in code:
        pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed: pyiceberg[sql-sqlite]")
    if "delta" in code:
        pytest.importorskip("deltalake", reason="deltalake is not installed: cvt-label[delta]")


def to_rows(result: Any) -> Rows:
    """Returns the rows of a result of any of the readers."""
    if hasattr(result, "to_arrow_table"):  # DuckDB
        result = result.to_arrow_table()
    if isinstance(result, list):
        return result
    if isinstance(result, pa.Table):
        return result.to_pylist()
    if hasattr(result, "to_dicts"):  # Polars
        return list(result.to_dicts())
    return [
        {name: None if value != value else value for name, value in row.items()}
        for row in result.to_dict("records")
    ]


def identify(rows: Iterable[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Returns model, shard, index and label of rows, sorted."""
    names = ("model", "shard", "index", "label")
    return sorted((tuple(row[name] for name in names) for row in rows), key=str)


def run(block: Block, labels: ExampleLabels, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs a block in the folder of the labels; returns its variables."""
    skip_unless_installed(block.text)
    labels.enter(patch)
    code = block.text.replace("384", str(WIDTH))
    if "datetime(2026" in code:
        code = code.replace("datetime(2026, 7, 1, tzinfo=UTC)", repr_of_first_publication(labels))
    found: dict[str, Any] = {}
    exec(compile(code, block.name, "exec"), found)
    return found


def repr_of_first_publication(labels: ExampleLabels) -> str:
    """Returns Python code of the time of the first publication of the first model."""
    import deltalake

    rows = deltalake.DeltaTable(str(labels.folder / "table"), version=1).to_pyarrow_table(
        columns=["published_at"]
    )
    [time] = set(rows["published_at"].to_pylist())
    return f"datetime.fromisoformat('{time.isoformat()}')"


def check_classes(result: Any, labels: ExampleLabels) -> None:
    found = {(row["model"], row["label"]): row["images"] for row in to_rows(result)}
    assert found == Counter((row["model"], row["label"]) for row in labels.rows)


def check_unsure(result: Any, labels: ExampleLabels) -> None:
    names = ("model", "shard", "key", "label", "score")
    expected = [{name: row[name] for name in names} for row in labels.rows if (row["score"] or 1) < 0.6]
    assert sorted(to_rows(result), key=str) == sorted(expected, key=str) != []


def check_vectors(result: Any, labels: ExampleLabels) -> None:
    expected = [row["embedding"] for row in labels.rows if row.get("embedding")]
    assert (result.shape, result.dtype) == ((len(expected), WIDTH), np.float32)
    assert sorted(result.tolist()) == sorted(expected)


def check_similar(result: Any, labels: ExampleLabels) -> None:
    rows = to_rows(result)
    assert len(rows) == 10
    assert rows[0]["similarity"] == pytest.approx(1, abs=1e-6)


def check_added(result: Any, labels: ExampleLabels) -> None:
    """All rows except those of the first publication that are still there, of one model or of both."""
    rows = to_rows(result)
    models = {row["model"] for row in rows}
    kept = {row["shard"] for row in labels.earlier if "deep/" in row["shard"]}
    expected = [
        row
        for row in labels.rows
        if row["model"] in models and not (row["model"] == MODELS[0] and row["shard"] in kept)
    ]
    assert identify(rows) == identify(expected) != []


def check_removed(result: Any, labels: ExampleLabels) -> None:
    names = sorted(row["shard"].rpartition("/")[2] for row in to_rows(result))
    assert names == ["a.tar", "gone.tar"]


def check_changes(result: Any, labels: ExampleLabels) -> None:
    """The changes lead from the first publication to the current rows."""
    rows = to_rows(result)
    state = Counter(identify(labels.earlier))
    state.update(identify(row for row in rows if row["_change_type"].lower() == "insert"))
    state.subtract(identify(row for row in rows if row["_change_type"].lower() == "delete"))
    assert +state == state == Counter(identify(labels.rows))


def check_publications(result: Any, labels: ExampleLabels) -> None:
    assert len(result) == 4


def check_earlier(result: Any, labels: ExampleLabels) -> None:
    assert identify(to_rows(result)) == identify(labels.earlier)


def check_appended(result: Any, labels: ExampleLabels) -> None:
    """The publications that replace shards are missing, as the page says."""
    rows = to_rows(result)
    assert {row["model"] for row in rows} == {MODELS[1]}
    assert {row["shard"] for row in rows} == {row["shard"] for row in labels.earlier}


CHECKS = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}


@pytest.mark.parametrize("kept", ["with_embeddings", "without_embeddings"])
@pytest.mark.parametrize(
    "block", [each for each in QUERIES if "pyspark" not in each.text], ids=lambda block: block.name
)
def test_query_returns_the_rows_of_the_prediction_files(
    block: Block, kept: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    labels: ExampleLabels = request.getfixturevalue(kept)
    if labels.embedding is None and "needs output.embedding" in block.text:
        pytest.skip("the labels have no embeddings")
    found = run(block, labels, monkeypatch)
    results = found.keys() & CHECKS.keys()
    assert results, "the block has no result that is checked"
    for name in results:
        CHECKS[name](found[name], labels)


#: Runs code of Spark in another process, and prints the rows of its results as JSON.
SPARK_PROGRAM = """
import json, sys
found = {}
exec(compile(sys.stdin.read(), "block", "exec"), found)
names = [name for name in ("classes", "unsure", "changes", "rows") if name in found]
rows = {name: [row.asDict() for row in found[name].collect()] for name in names}
print("RESULTS" + json.dumps(rows, default=str))
"""


def run_spark(code: str, labels: ExampleLabels) -> dict[str, Rows]:
    """Runs code in Spark with the connectors of `SPARK_JARS`; returns the rows of its results.

    Skips the test without Spark, Java, or the connector that the code needs.
    """
    reason = "needs pyspark, java, and the connector in SPARK_JARS (files, separated by commas)"
    pytest.importorskip("pyspark", reason=reason)
    jars = os.environ.get("SPARK_JARS", "")
    connector = "delta-spark" if "delta" in code else "iceberg-spark-runtime"
    if shutil.which("java") is None or connector not in jars:
        pytest.skip(f"{reason}: {connector}")
    catalog = {
        "": "org.apache.iceberg.spark.SparkCatalog",
        ".type": "jdbc",
        ".uri": f"jdbc:sqlite:{labels.folder}/catalog.db",
        ".warehouse": f"file://{labels.folder}/warehouse",
    }
    settings = {
        "spark.ui.enabled": "false",
        "spark.sql.shuffle.partitions": "1",
        "spark.sql.extensions": "org.apache.iceberg.spark.extensions.IcebergSparkSessionExtensions",
        **{f"spark.sql.catalog.lake{name}": value for name, value in catalog.items()},
    }
    options = " ".join(f"--conf {name}={value}" for name, value in settings.items())
    submit = f"--master local[1] --jars {jars} {options} pyspark-shell"
    for name, value in {"rest": "jdbc", "https://catalog.example.com": catalog[".uri"]}.items():
        code = code.replace(f'"{name}"', f'"{value}"')
    done = subprocess.run(
        [sys.executable, "-c", SPARK_PROGRAM],
        input=code.replace('"analytics"', f'"{catalog[".warehouse"]}"'),
        cwd=labels.folder,
        env=os.environ | {"PYSPARK_SUBMIT_ARGS": submit, "SPARK_LOCAL_IP": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Rows] = json.loads(done.stdout.partition("RESULTS")[2])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [each for each in QUERIES if "pyspark" in each.text], ids=lambda block: block.name
)
def test_spark_query_returns_the_rows_of_the_prediction_files(
    block: Block, with_embeddings: ExampleLabels
) -> None:
    found = run_spark(block.text, with_embeddings)
    assert found
    for name, rows in found.items():
        CHECKS[name](rows, with_embeddings)


@pytest.mark.parametrize("name", FORMATS)
def test_extensions_of_duckdb_return_the_rows_of_the_prediction_files(
    name: str, with_embeddings: ExampleLabels, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = connect_with_extension(name)
    skip_unless_installed("deltalake pyiceberg")
    from pyiceberg.catalog import load_catalog

    with_embeddings.enter(monkeypatch)
    location = load_catalog("lake").load_table("vision.labels").metadata_location
    [block] = blocks_of("sql", page=READ_PAGE)
    [query] = [line for line in block.text.splitlines() if f"{name}_scan" in line]
    result = connection.execute(query.replace("METADATA_LOCATION", location))
    check_classes(result.to_arrow_table(), with_embeddings)


def check_tables(labels: ExampleLabels) -> None:
    """Asserts that each table has the rows of the prediction files, and that there is nothing to publish."""
    from deltalake import DeltaTable
    from pyiceberg.catalog import load_catalog

    for model in MODELS:
        partition = Partition.open(Storage(), f"{labels.folder}/labels/model={model}")
        for target in ("delta:table", "iceberg:lake.vision.labels"):
            assert publish_labels(partition, target).published_at is None
    iceberg = load_catalog("lake").load_table("vision.labels").scan().to_arrow()
    for rows in (DeltaTable("table").to_pyarrow_table(), iceberg):
        assert identify(rows.to_pylist()) == identify(labels.rows)


MAINTENANCE = blocks_of("python", "sql", page=PUBLISH_PAGE)


@pytest.mark.parametrize("block", MAINTENANCE, ids=lambda block: block.name)
def test_maintenance_keeps_rows_and_the_next_publication_finds_nothing_to_do(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_installed("deltalake pyiceberg")
    labels = ExampleLabels(tmp_path, "float16")
    if block.kind == "python":
        run(block, labels, monkeypatch)
    else:
        calls = "".join(f'''spark.sql("""{call}""").show()\n''' for call in block.text.split(";")[:-1])
        found = run_spark(
            f"from pyspark.sql import SparkSession\nspark = SparkSession.builder.getOrCreate()\n{calls}"
            "rows = spark.table('lake.vision.labels')",
            labels,
        )
        assert identify(found["rows"]) == identify(labels.rows)
        labels.enter(monkeypatch)
    check_tables(labels)
