"""The Python and SQL in the documentation runs, on labels as the pages assume them."""

from __future__ import annotations

import re
import secrets
import shutil
from typing import Any

import pytest

from jobs.local_s3 import LocalS3
from pipeline.storage import Storage
from tests.docs.example_labels import ExampleLabels
from tests.docs.pages import Block, blocks_of

#: Pages whose blocks query the labels of `ExampleLabels`, each block on its own.
QUERY_PAGES = (
    "docs/how-to/read-labels.md",
    "docs/how-to/compare-and-gate.md",
    "docs/reference/output-schema.md",
)
QUERIES = [block for page in QUERY_PAGES for block in blocks_of("python", "sql", page=page)]

#: A block that needs one of these is skipped if the package is not installed.
PACKAGES = ("duckdb", "polars", "pandas", "datasets", "pyspark")

NEEDS_EMBEDDING = "needs output.embedding"


def needed_packages(block: Block) -> set[str]:
    """Returns the packages that a block needs besides this project's own."""
    needed = {name for name in PACKAGES if re.search(rf"^(import|from) {name}\b", block.text, re.M)}
    return needed | ({"duckdb"} if block.kind == "sql" else set())


def skip_unless_installed(block: Block) -> None:
    for package in sorted(needed_packages(block)):
        reason = f"{package} is not installed: cvt-label[consumers], or pyspark with Java"
        pytest.importorskip(package, reason=reason)
        if package == "pyspark" and shutil.which("java") is None:
            pytest.skip(reason)


@pytest.mark.parametrize("kept", ["with_embeddings", "without_embeddings"])
@pytest.mark.parametrize("block", QUERIES, ids=lambda block: block.name)
def test_queries_run_and_find_rows(
    block: Block,
    kept: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels: ExampleLabels = request.getfixturevalue(kept)
    skip_unless_installed(block)
    if "pyspark" in block.text and labels.embedding == "float16":
        pytest.skip("Spark does not read half precision, as the page says")
    monkeypatch.chdir(labels.folder)
    monkeypatch.setenv("HF_HOME", str(labels.folder / "hf"))
    code = block.text
    if "my-bucket" in code:
        server: LocalS3 = request.getfixturevalue("s3_server")
        bucket = f"labels-{secrets.token_hex(4)}"
        server.create_bucket(bucket)
        for path in labels.files:
            Storage().write(f"s3://{bucket}/{path.relative_to(labels.folder)}", path.read_bytes())
        code = code.replace("my-bucket", bucket)
    if block.kind == "sql":
        assert all(run_sql(code, without=None if labels.embedding else NEEDS_EMBEDDING)), code
    else:
        exec(compile(code, block.name, "exec"), {})
        assert capsys.readouterr().out.strip()


def run_sql(code: str, without: str | None = None) -> list[list[Any]]:
    """Returns the rows of each query, except of queries that contain `without`."""
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


def test_duckdb_queries_return_the_right_rows(
    with_embeddings: ExampleLabels, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = with_embeddings
    pytest.importorskip("duckdb", reason="duckdb is not installed: cvt-label[consumers]")
    monkeypatch.chdir(labels.folder)
    *_, block = blocks_of("sql", page=QUERY_PAGES[0])
    classes, unsure, errors, accuracy, wrong, best, disagree, similar = run_sql(block.text)
    good = [row for row in labels.rows if row["error"] is None]
    assert sum(row[2] for row in classes) == len(good)
    assert [row[3] for row in unsure] == sorted(r["score"] for r in good if r["score"] < 0.6)
    assert sum(row[1] for row in errors) == len(labels.rows) - len(good) > 4
    assert {row[0]: row[1] for row in errors}["cannot decode"] >= 4
    for model, count, top1, _ in accuracy:
        known = [r for r in good if r["model"] == model and r["target_id"] is not None]
        assert count == len(known)
        assert top1 == pytest.approx(sum(r["label_id"] == r["target_id"] for r in known) / len(known))
    assert len(wrong) == sum(r["target_id"] not in (None, r["label_id"]) for r in good)
    assert all(label != target for _, _, label, target, _ in wrong)
    assert len(best) == sum(len(r["topk_label_ids"]) for r in good)
    by_model: dict[str, dict[tuple[str, int], str]] = {}
    for row in good:
        by_model.setdefault(row["model"], {})[row["shard"], row["index"]] = row["label"]
    one, other = by_model.values()
    assert len(disagree) == sum(one[sample] != other[sample] for sample in one) > 0
    assert similar[0][3] == pytest.approx(1, abs=1e-3)
    assert len(similar) == 10


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_polars_example_for_buckets_uses_the_endpoint(
    with_embeddings: ExampleLabels,
    bucket: str,
    s3_server: LocalS3,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    """Polars itself reads AWS_ENDPOINT_URL."""
    pytest.importorskip("polars", reason="polars is not installed: cvt-label[consumers]")
    for path in with_embeddings.files:
        Storage().write(f"{bucket}/{path.relative_to(with_embeddings.folder)}", path.read_bytes())
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv(variable, s3_server.endpoint_url)
    found: dict[str, Any] = {}
    [code] = [block.text for block in QUERIES if "s3://my-bucket" in block.text]
    exec(compile(code.replace("s3://my-bucket", bucket), QUERY_PAGES[0], "exec"), found)
    assert found["labels"].select("key").collect().height == len(with_embeddings.rows)
