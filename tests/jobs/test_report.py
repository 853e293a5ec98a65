"""Tests of the command `report`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import cvt_label
from tests.pipeline.report.test_report import make_partition


def test_report_is_written_to_the_partition_or_to_output(tmp_path: Path) -> None:
    uri = make_partition(tmp_path, ["a", "b"]).uri
    done = cvt_label("report", uri)
    assert done.returncode == 0, done.stderr
    assert f"{uri}/report.html" in done.stdout
    page = tmp_path / "page.html"
    assert cvt_label("report", uri, "--output", page).returncode == 0
    assert page.read_bytes() == Path(uri, "report.html").read_bytes()


@pytest.mark.parametrize("command", ["report", "compare"])
def test_unwritable_output_ends_with_4_and_names_the_path(tmp_path: Path, command: str) -> None:
    uri = make_partition(tmp_path, ["a", "b"]).uri
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "page.html"
    done = cvt_label(command, *[uri] * (2 if command == "compare" else 1), "--output", output)
    assert done.returncode == 4
    assert f"{output}: a parent folder of this path is a file" in done.stderr


def test_missing_run_record_ends_with_4(tmp_path: Path) -> None:
    uri = make_partition(tmp_path, ["a", "b"]).uri
    done = cvt_label("report", uri, "--run", "20260101T000000.000000Z-ffffff")
    assert done.returncode == 4
    assert "has no record of run 20260101T000000.000000Z-ffffff" in done.stderr
    assert cvt_label("report", tmp_path).returncode == 4


def test_report_and_compare_import_neither_torch_nor_ray(tmp_path: Path) -> None:
    first = make_partition(tmp_path, ["a", "b"]).uri
    second = make_partition(tmp_path, ["a", "b"], "model=other-ffffffff").uri
    program = f"""
import sys
from jobs.compare import compare
from jobs.report import report
report({first!r}, against=[{second!r}])
try:
    compare({first!r}, {second!r})
except SystemExit as ended:
    assert ended.code == 0
assert not {{"torch", "ray", "transformers"}} & set(sys.modules), sorted(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
