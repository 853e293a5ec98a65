"""Tests of the benchmark of publishing: its steps, and the comparison of tables with prediction files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmarks.publish import publish
from jobs.benchmarks.publish_steps import check_table, measure_publication
from jobs.benchmarks.sections import CheckError, Row
from jobs.benchmarks.synthetic_labels import SyntheticLabels
from tests.command import invoke


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--formats", "delta", "--embedding", 8],
        pytest.param(["--formats", "iceberg", "--s3"], marks=pytest.mark.long),
    ],
)
def test_every_row_is_checked_after_every_step(tmp_path: Path, options: list[Any]) -> None:
    figures = tmp_path / "figures.json"
    done = invoke(publish, "--rows", 20, "--shards", 3, *options, "--output", figures)
    rows = json.loads(figures.read_text())["publications"]
    assert {row["format"] for row in rows} == {options[1]}
    assert [row["rows_written"] for row in rows] == [60, 0, 20, 20, 80]
    assert [row["rows_checked"] for row in rows] == [60, 60, 60, 80, 80]
    for row in rows:
        assert row["memory_mb"] > 0
        assert row["files"] > 0
        assert row["table_mb"] > 0
        assert 0 < row["library"] <= 1
    assert "nothing new" in done.output


def test_table_with_other_values_or_rows_than_the_predictions_fails_the_check(tmp_path: Path) -> None:
    labels = SyntheticLabels(f"{tmp_path}/labels/model=synthetic-00000000", rows=10)
    labels.write(0, 2, seed=0)
    rows: list[Row] = []
    settings: Row = {"partition": labels.uri, "to": f"delta:{tmp_path}/table", "rows": 10, "embedding": 0}
    measure_publication({**settings, "rebuild": False, "memory": 10**9}, rows.append)
    settings["published"] = [{"run": "run-0", "at": rows[0]["published_at"]}] * 2
    check_table(settings, rows.append)
    assert rows[1]["rows_checked"] == 20
    labels.write(1, 2, seed=1)
    with pytest.raises(CheckError, match="other values of label"):
        check_table(settings, rows.append)
    with pytest.raises(CheckError, match="has 20 rows, expected 30"):
        check_table({**settings, "published": [*settings["published"], {}]}, rows.append)


def test_unknown_format_ends_with_2() -> None:
    assert "unknown format: lance" in invoke(publish, "--formats", "delta,lance", status=2).output
