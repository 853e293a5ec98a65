"""Columns of `input.carry` in each prediction row, and what reads prediction files with such columns."""

from __future__ import annotations

import datetime as dt
import io
import json
import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.compare import compare_labels
from pipeline.config import ConfigError
from pipeline.publish import publish_labels
from pipeline.run import RunResult, label, plan_run, rebuild
from pipeline.storage import Storage
from tests.makers import make_image, make_parquet, make_tar
from tests.runs import run_config

IMAGES = [make_image(i) for i in range(3)]
TIME = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


def write(root: Path, name: str, data: bytes) -> None:
    Storage().write(f"{root}/in/{name}", data)


def write_tar(root: Path, documents: list[Any], name: str = "x.tar") -> None:
    members = []
    for i, document in enumerate(documents):
        text = document if isinstance(document, bytes) else json.dumps(document).encode()
        members += [(f"{i}.jpg", make_image(i)), (f"{i}.json", text)]
    write(root, name, make_tar(members))


def run(root: Path, carry: Any, *fields: str) -> RunResult:
    return label(run_config(root, f"input.carry={json.dumps(carry)}", *fields))


def table(root: Path, name: str = "") -> pa.Table:
    [path] = [each for each in (root / "out").rglob(f"*{name}.parquet") if "predictions" in each.parts]
    return pq.read_table(path)


COLUMNS = {
    "number": pa.array([1, None, -3], pa.int16()),
    "price": pa.array([Decimal("1.50"), Decimal("-2.25"), None], pa.decimal128(9, 2)),
    "captured_at": pa.array([TIME, TIME, None], pa.timestamp("ns", "UTC")),
    "local_time": pa.array([TIME, TIME, None], pa.timestamp("us", "Europe/Berlin")),
    "day": pa.array([TIME.date(), None, TIME.date()], pa.date32()),
    "flag": pa.array([True, False, None]),
    "ratio": pa.array([0.5, None, float("nan")], pa.float32()),
    "text": pa.array(["ä", "", None], pa.large_string()),
    "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
    "raw": pa.array([b"\x00\xff", b"", None], pa.binary()),
    "tags": pa.array([["a", "b"], [], None], pa.list_(pa.string())),
    "nothing": pa.nulls(3),
}


def test_columns_of_parquet_keep_their_types_and_values(tmp_path: Path) -> None:
    write(tmp_path, "x.parquet", make_parquet({**COLUMNS, "image": IMAGES}, row_group_size=2))
    run(tmp_path, [*COLUMNS])
    found = table(tmp_path)
    assert found.column_names[-len(COLUMNS) :] == [*COLUMNS]
    for name, values in COLUMNS.items():
        if name == "ratio":
            assert str(found[name].to_pylist()) == "[0.5, None, nan]"
        else:
            assert found[name].to_pylist() == pa.array(values).to_pylist(), name
    types = {name: str(found[name].type) for name in COLUMNS}
    assert types["price"] == "decimal128(9, 2)"
    assert types["captured_at"] == "timestamp[ns, tz=UTC]"
    assert types["day"] == "date32[day]"
    assert types["nothing"] == "string"


def test_error_rows_have_carried_values(tmp_path: Path) -> None:
    images = [IMAGES[0], b"no image", None]
    write(tmp_path, "x.parquet", make_parquet({"image": pa.array(images, pa.binary()), "id": [7, 8, 9]}))
    write_tar(tmp_path, [{"id": 1}], "y.tar")
    write(tmp_path, "z.tar", make_tar([("0.txt", b""), ("0.json", b'{"id": 5}')]))
    run(tmp_path, ["id"], "gate.max_error_fraction=1")
    found = table(tmp_path, "x.parquet")
    assert [error is not None for error in found["error"].to_pylist()] == [False, True, True]
    assert found["id"].to_pylist() == [7, 8, 9]
    assert table(tmp_path, "z.tar")["id"].to_pylist() == [5]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([True, None], "bool", [True, None]),
        ([1, 2**62], "int64", [1, 2**62]),
        ([1, 2.5], "double", [1.0, 2.5]),
        (["a", "\ud800"], "string", ["a", "\\ud800"]),
        ([1, "a"], "string", ["1", "a"]),
        ([True, 1], "string", ["true", "1"]),
        ([2**70, 1], "string", [str(2**70), "1"]),
        ([{"b": [1]}, [2]], "string", ['{"b": [1]}', "[2]"]),
        ([None, None], "string", [None, None]),
    ],
)
def test_fields_of_json_are_typed_by_their_values(
    values: list[Any], kind: str, expected: list[Any], tmp_path: Path
) -> None:
    # Each chunk of five samples has other values; a sample may lack the field or the document.
    write_tar(tmp_path, [{"a": {"b": values[0]}}] + [{}] * 6 + [{"a": {"b": values[1]}}, [], None])
    run(tmp_path, ["a.b"])
    found = table(tmp_path)["a.b"]
    assert str(found.type) == kind
    assert found.to_pylist() == [expected[0]] + [None] * 6 + [expected[1], None, None]


def test_declared_types_convert_values(tmp_path: Path) -> None:
    write_tar(tmp_path, [{"t": "2026-01-02T03:04:05", "n": "12"}, {"t": "?", "n": 3}, b"{"])
    write(tmp_path, "y.tar", make_tar({"0.jpg": IMAGES[0]}))
    run(tmp_path, {"t": "timestamp[s]", "n": "int32"}, "gate.max_error_fraction=1")
    found = table(tmp_path, "x.tar")
    assert found["n"].to_pylist() == [12, 3, None]
    assert found["t"].to_pylist() == [TIME.replace(tzinfo=None), None, None]
    errors = found["error"].to_pylist()
    assert errors[0] is None
    assert errors[1].startswith("invalid carried value: 't': ")
    assert errors[2].startswith("invalid carried value: the .json member cannot be read: ")
    assert str(table(tmp_path, "y.tar")["t"].type) == "timestamp[ms]"


def test_declared_types_may_have_a_zone_or_a_scale(tmp_path: Path) -> None:
    write_tar(tmp_path, [{"t": "2026-01-02T04:04:05+01:00", "d": 1.5}, {"t": None, "d": "2.25"}])
    run(tmp_path, {"t": "timestamp[us, UTC]", "d": "decimal128(9, 2)"})
    found = table(tmp_path)
    assert str(found["t"].type) == "timestamp[us, tz=UTC]"
    assert found["t"].to_pylist() == [TIME, None]
    assert found["d"].to_pylist() == [Decimal("1.50"), Decimal("2.25")]


def test_values_over_the_limit_are_errors_of_their_rows(tmp_path: Path) -> None:
    texts = ["x" * 70_000, "y" * 60_000, "z"]
    write(tmp_path, "x.parquet", make_parquet({"image": IMAGES, "text": texts}))
    run(tmp_path, ["text"], "gate.max_error_fraction=1")
    found = table(tmp_path)
    assert found["text"].to_pylist() == [None, *texts[1:]]
    [error] = [error for error in found["error"].to_pylist() if error]
    assert "'text'" in error
    assert "input.carry" in error


def test_column_that_files_lack_is_null_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "x.parquet", make_parquet({"image": IMAGES, "id": [1, 2, 3]}))
    write(tmp_path, "y.parquet", make_parquet({"image": IMAGES}))
    write(tmp_path, "z.jpg", IMAGES[0])
    with caplog.at_level(logging.WARNING):
        run(tmp_path, {"id": "int64", "nope": None})
    assert table(tmp_path, "y.parquet")["id"].to_pylist() == [None] * 3
    assert table(tmp_path, "y.parquet")["id"].type == pa.int64()
    assert table(tmp_path, "images-0000000000000000")["nope"].type == pa.string()
    [message] = [record.getMessage() for record in caplog.records if "input.carry" in record.getMessage()]
    assert "'nope'" in message


def test_changed_setting_relabels_within_the_same_partition(tmp_path: Path) -> None:
    write(tmp_path, "x.parquet", make_parquet({"image": IMAGES, "id": [1, 2, 3]}))
    first = label(run_config(tmp_path))
    assert "/" not in (
        plan_run(run_config(tmp_path)).repairs.entries[f"{tmp_path}/in/x.parquet"].version or "/"
    )
    second = run(tmp_path, ["id"])
    assert second.job.partition.uri == first.job.partition.uri
    assert second.totals.images == 3
    assert run(tmp_path, ["id"]).plan.shards == []
    assert len(run(tmp_path, {"id": "string"}).plan.shards) == 1
    assert table(tmp_path)["id"].to_pylist() == ["1", "2", "3"]
    assert table(tmp_path)["version"].to_pylist() == [Storage().version(f"{tmp_path}/in/x.parquet")] * 3
    assert len(label(run_config(tmp_path)).plan.shards) == 1
    assert "id" not in table(tmp_path).column_names


def test_names_of_prediction_columns_get_a_prefix(tmp_path: Path) -> None:
    taken = ["shard", "key", "error", "Width", "target", "embedding", "model"]
    documents = [{name: f"{name} {i}" for name in [*taken, "free"]} for i in range(3)]
    write_tar(tmp_path, documents)
    columns = {name: [each[name] for each in documents] for name in [*taken, "free"]}
    write(tmp_path, "y.parquet", make_parquet(columns | {"image": IMAGES}))
    result = run(tmp_path, [*taken, "free"], "output.label_names=true")
    names = [*(f"input_{name}" for name in taken), "free"]
    for shard in ("x.tar", "y.parquet"):
        found = table(tmp_path, shard)
        assert found.column_names[-len(names) :] == names
        assert [found[name].to_pylist() for name in names] == [*columns.values()]
        assert found["error"].to_pylist() == [None] * 3
        assert found["width"].to_pylist() == [32] * 3
    folder = f"{result.job.partition.uri}/predictions/**/*.parquet"
    query = f"SELECT DISTINCT model FROM read_parquet('{folder}', hive_partitioning = true)"
    assert duckdb.sql(query).fetchall() == [(result.job.partition.model,)]
    rebuild(result.job.partition)
    assert publish_labels(result.job.partition, f"delta:{tmp_path}/table").published_at is not None
    assert run(tmp_path, [*taken, "free"], "output.label_names=true").plan.shards == []


def test_parts_of_a_file_carry_columns(tmp_path: Path) -> None:
    images = [make_image(i) for i in range(12)]
    data = make_parquet({"image": images, "id": list(range(12))}, row_group_size=2)
    write(tmp_path, "x.parquet", data)
    result = run(tmp_path, ["id"], f"read.split_bytes={len(data) // 3}")
    assert result.totals.shards > 1
    query = f"SELECT key::int, id FROM read_parquet('{tmp_path}/out/*/predictions/**/*.parquet')"
    assert sorted(duckdb.sql(query).fetchall()) == [(i, i) for i in range(12)]
    assert run(tmp_path, ["id"], f"read.split_bytes={len(data) // 3}").plan.shards == []


@pytest.mark.parametrize(
    ("carry", "cause"),
    [
        (["a", "A"], "input.carry: 'a' and 'A' are names of the same column 'A'; remove one"),
        (["width", "input_Width"], "'width' and 'input_Width' are names of the same column"),
        ({"a": "text"}, "is not an Arrow type"),
        ({"a": "null"}, "is not an Arrow type"),
        ({"a": "decimal128(99, 2)"}, "is not an Arrow type"),
    ],
)
def test_invalid_setting_is_refused_with_the_remedy(carry: Any, cause: str, tmp_path: Path) -> None:
    write(tmp_path, "x.parquet", make_parquet({"image": IMAGES}))
    with pytest.raises(ConfigError, match=cause):
        run(tmp_path, carry)


def test_readers_of_prediction_files_accept_carried_columns(tmp_path: Path) -> None:
    write(tmp_path, "x.parquet", make_parquet({"image": IMAGES, "id": [1, 2, 3], "label": [0, 1, 2]}))
    write_tar(tmp_path, [{"id": 4}, {"id": 5}], "y.tar")
    before = label(run_config(tmp_path))
    result = run(tmp_path, ["id"], "input.label_column=label")
    pattern = f"{result.job.partition.uri}/predictions/**/*.parquet"
    assert sorted(duckdb.sql(f"SELECT id FROM '{pattern}'").fetchall()) == [(i,) for i in range(1, 6)]
    frame = polars.read_parquet(pattern)
    assert sorted(frame["id"]) == [1, 2, 3, 4, 5]
    old = f"{before.job.partition.uri}/predictions/**/*.parquet"
    union = f"SELECT count(*), count(id) FROM read_parquet(['{old}', '{pattern}'], union_by_name = true)"
    assert duckdb.sql(union).fetchall() == [(10, 5)]
    comparison = compare_labels(before.job.partition.uri, result.job.partition.uri)
    assert comparison.agreement is not None
    assert publish_labels(result.job.partition, f"delta:{tmp_path}/table").published_at is not None
    published = duckdb.sql(f"SELECT * FROM '{tmp_path}/table/model=*/*.parquet'")
    assert published.count("*").fetchall() == [(5,)]
    assert "id" not in published.columns
    assert b"Dress" in Storage().read(f"{result.job.partition.uri}/report.html")
    rebuild(result.job.partition)
    assert run(tmp_path, ["id"], "input.label_column=label").plan.shards == []
    manifest = pq.read_table(io.BytesIO(Storage().read(result.job.partition.manifest.uri)))
    assert sum(manifest["rows"].to_pylist()) == 5


def test_changed_setting_of_a_table_copies_the_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        write(tmp_path, f"{i}.jpg", make_image(i))
    lines = [{"path": f"{i}.jpg", "id": i, "size": i, "at": "2026-01-02T03:04:05"} for i in range(4)]
    lines[2]["at"] = None
    write(tmp_path, "table.jsonl", "\n".join(map(json.dumps, lines)).encode())
    fields = ("input.format=table", f"input.uri={tmp_path}/in/table.jsonl", "gate.max_error_fraction=1")
    run(tmp_path, ["id"], *fields)
    assert table(tmp_path)["id"].to_pylist() == [0, 1, 2, 3]
    read = []
    fetch = Storage.read
    monkeypatch.setattr(
        Storage, "read", lambda s, uri, *args, **kw: read.append(uri) or fetch(s, uri, *args, **kw)
    )
    result = run(tmp_path, {"at": "timestamp[s]", "id": "string", "nope": None, "size": None}, *fields)
    assert result.totals.shards == 1
    assert [uri for uri in read if uri.endswith(".jpg")] == []
    found = table(tmp_path)
    assert found["id"].to_pylist() == ["0", "1", "2", "3"]
    assert found["input_size"].to_pylist() == [0, 1, 2, 3]
    assert [at is None for at in found["at"].to_pylist()] == [False, False, True, False]
    assert [error is None for error in found["error"].to_pylist()] == [True, True, True, False]
