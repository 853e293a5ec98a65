"""`classify.runtime: auto`: what runs the model, and how a partition keeps its runtime."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cvt.runtimes import openvino_is_installed
from pipeline.config import ConfigError
from pipeline.run import RunResult, label, plan_run
from pipeline.storage import Storage
from tests.makers import make_image, make_tar
from tests.runs import run_config as config

needs_openvino = pytest.mark.skipif(
    not openvino_is_installed(), reason="cvt-label[openvino] is not installed"
)


@pytest.fixture
def root(tmp_path: Path) -> str:
    write(str(tmp_path), "a.tar", 0)
    return str(tmp_path)


def write(root: str, name: str, seed: int) -> None:
    members = [(f"{i}.jpg", make_image(seed + i)) for i in range(4)]
    Storage().write(f"{root}/in/{name}", make_tar(members))


def runtime(result: RunResult) -> str:
    """Returns the recorded runtime of a run."""
    record = Storage().read(f"{result.partition.uri}/runs/{result.run}.json")
    return str(json.loads(record)["resources"]["runtime"])


def footers(root: str) -> list[str]:
    """Returns the runtime in the footer of each prediction file."""
    files = sorted(Path(root, "out").glob("*/predictions/**/*.parquet"))
    return [pq.read_metadata(file).metadata[b"cvt_label.runtime"].decode() for file in files]


def hide_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)


@needs_openvino
def test_first_run_takes_openvino_and_records_it(root: str) -> None:
    result = label(config(root))
    assert runtime(result) == "openvino"
    assert footers(root) == ["openvino"]


def test_first_run_without_openvino_takes_torch(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_openvino(monkeypatch)
    result = label(config(root))
    assert runtime(result) == "torch"
    assert footers(root) == ["torch"]


def test_later_run_keeps_the_runtime_that_labeled_the_partition(root: str) -> None:
    first = label(config(root, "classify.runtime=torch"))
    shutil.rmtree(f"{first.partition.uri}/runs")
    Path(first.partition.manifest.uri).unlink()
    write(root, "b.tar", 10)
    result = label(config(root))
    assert result.partition.uri == first.partition.uri
    assert result.totals.shards == 1
    assert runtime(result) == "torch"


@needs_openvino
def test_missing_runtime_of_a_partition_is_an_error_with_the_remedy(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    label(config(root))
    write(root, "b.tar", 10)
    hide_openvino(monkeypatch)
    assert len(plan_run(config(root)).plan.shards) == 1
    message = r"openvino made the stored labels, but .* pip install .* or set classify\.runtime: torch"
    with pytest.raises(ConfigError, match=message):
        label(config(root))
    assert footers(root) == ["openvino"]
    assert runtime(label(config(root, "classify.runtime=torch"))) == "torch"
    assert footers(root) == ["openvino", "torch"]


@needs_openvino
def test_rerun_with_auto_writes_the_same_bytes(root: str) -> None:
    def content(result: RunResult) -> list[bytes]:
        return [
            file.read_bytes() for file in sorted(Path(result.partition.uri).glob("predictions/**/*.parquet"))
        ]

    first = content(label(config(root)))
    Path(root, "out").rename(Path(root, "before"))
    assert content(label(config(root))) == first


def test_file_of_an_earlier_version_was_labeled_by_torch(root: str) -> None:
    label(config(root, "classify.runtime=torch"))
    file = next(Path(root, "out").glob("*/predictions/**/*.parquet"))
    content = io.BytesIO(file.read_bytes())
    metadata = {k: v for k, v in pq.read_metadata(content).metadata.items() if k != b"cvt_label.runtime"}
    table = pq.read_table(content).replace_schema_metadata(None)
    with pq.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({k: v for k, v in metadata.items() if k != b"ARROW:schema"})
    write(root, "b.tar", 10)
    assert runtime(label(config(root))) == "torch"
