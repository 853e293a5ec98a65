"""Spark reads the data files of published tables, without a connector for the format of the table."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.pipeline.publish.tables import TABLE_COLUMNS, Dataset

pytestmark = pytest.mark.slow

#: Prints the rows of Parquet files as JSON. The option prevents that folders are read as columns.
PROGRAM = """
import json, sys
from pyspark.sql import SparkSession
spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
rows = spark.read.option("recursiveFileLookup", "true").parquet(*sys.argv[1:])
print("ROWS" + json.dumps([row.asDict() for row in rows.collect()], default=str))
"""


def _read_with_spark(*files: str) -> list[dict[str, Any]]:
    pytest.importorskip("pyspark", reason="pyspark is not installed")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *files],
        env=os.environ | {"SPARK_LOCAL_IP": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout.partition("ROWS")[2])
    return rows


def test_spark_reads_all_columns_of_the_current_files(local: Dataset) -> None:
    local.embedding = "float16"
    local.label(**{"a": 5, "it's 100%2F é": 6})
    local.publish()
    local.label(a=4, b=3)
    local.publish()
    rows = _read_with_spark(*local.files())
    found = [{name: value for name, value in row.items() if name not in TABLE_COLUMNS} for row in rows]
    for row in found:
        if row["embedding"] is None:
            del row["embedding"]
    assert sorted(found, key=lambda row: (row["shard"], row["index"])) == local.labels()
