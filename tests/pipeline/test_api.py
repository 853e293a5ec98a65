"""The public Python API, as a program or a notebook uses it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from pipeline.config import ConfigError
from pipeline.storage import Storage, StorageError
from tests.makers import make_samples, make_tar
from tests.partitions import make_predictions, write_partition


def job(root: Path, *overrides: str) -> pipeline.Config:
    fields = [f"input.uri={root}/in", f"output.uri={root}/out", "model.path=fashion-mnist"]
    return pipeline.load_job_config(None, [*fields, "ray.address=in-process", *overrides])


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pipeline.RunResult]:
    root = tmp_path_factory.mktemp("api")
    (root / "in").mkdir()
    for name in ("a.tar", "b.tar"):
        (root / "in" / name).write_bytes(make_tar(make_samples(4)))
    return root, pipeline.label(job(root))


def test_every_public_name_exists() -> None:
    assert all(getattr(pipeline, name) is not None for name in pipeline.__all__)
    assert pipeline.__version__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pipeline.nonsense


def test_label_returns_the_result_of_the_run(labeled: tuple[Path, pipeline.RunResult]) -> None:
    _, result = labeled
    assert (result.totals.images, result.totals.shards, result.is_complete) == (8, 2, True)


def test_plan_lists_new_shards(labeled: tuple[Path, pipeline.RunResult]) -> None:
    root, _ = labeled
    assert pipeline.plan(job(root)).plan.shards == []
    again = pipeline.plan(job(root), pipeline.Selection(relabel=True)).plan
    assert [shard.uri for shard in again.shards] == [f"{root}/in/a.tar", f"{root}/in/b.tar"]


def test_labels_are_read_without_their_model(labeled: tuple[Path, pipeline.RunResult]) -> None:
    root, result = labeled
    partition = pipeline.open_partition(result.partition.uri)
    tables = list(partition.read_labels(["shard", "key"]))
    assert [table["shard"][0].as_py() for table in tables] == [f"{root}/in/a.tar", f"{root}/in/b.tar"]
    assert tables[0]["key"].to_pylist() == [f"{i:05d}" for i in range(4)]
    assert "score" in next(iter(partition.read_labels())).column_names
    assert partition.labels[0] == "T-shirt/top"
    assert partition.topk() == 5


def test_topk_is_at_most_the_number_of_classes(tmp_path: Path) -> None:
    uri, labels = f"{tmp_path}/model=a-00000000", ["a", "b", "c"]
    shards = {"/in/0.tar": make_predictions("/in/0.tar", labels, [0])}
    write_partition(Storage(), uri, labels, [shards], {"config": {"output": {"topk": 11}}})
    assert pipeline.open_partition(uri).topk() == 3


def test_a_configuration_finds_its_partition(labeled: tuple[Path, pipeline.RunResult]) -> None:
    root, result = labeled
    assert pipeline.find_partition(job(root)).uri == result.partition.uri
    # Neither where the input is nor how the work is spread determines a label.
    other = job(root, f"input.uri={root}/elsewhere", "classify.batch_size=7")
    assert pipeline.find_partition(other).uri == result.partition.uri


@pytest.mark.parametrize("override", ["output.topk=1", "input.labels=false", "model.path=cvt-13"])
def test_a_configuration_of_other_labels_finds_none(
    labeled: tuple[Path, pipeline.RunResult], override: str
) -> None:
    root, _ = labeled
    with pytest.raises(StorageError, match="no run has labeled with this model and these options"):
        pipeline.find_partition(job(root, override))


def test_a_replaced_checkpoint_is_found_by_its_latest_run(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(make_tar(make_samples(2)))
    config = job(tmp_path, f"model.labels={labels}")
    uris = []
    for prefix in ("old", "new"):
        labels.write_text("\n".join(f"{prefix} {i}" for i in range(10)))
        uris.append(pipeline.label(config).partition.uri)
    assert uris[0] != uris[1]
    assert pipeline.find_partition(config).uri == uris[1]


def test_a_report_is_written_again(labeled: tuple[Path, pipeline.RunResult], tmp_path: Path) -> None:
    _, result = labeled
    written = pipeline.write_report(result.partition, output=str(tmp_path / "page.html"))
    assert Path(written).read_text().startswith("<!doctype html>")
    with pytest.raises(StorageError, match="no record of run nonsense"):
        pipeline.write_report(result.partition, run="nonsense")


def test_two_labelings_are_compared(labeled: tuple[Path, pipeline.RunResult], tmp_path: Path) -> None:
    root, result = labeled
    other = pipeline.label(job(root, "output.topk=1")).partition
    found = pipeline.compare_labels(result.partition.uri, other.uri)
    assert found.agreement is not None
    assert (found.agreement.compared, found.agreement.fraction) == (8, 1.0)


@pytest.mark.parametrize(
    ("recorded", "asked"),
    [
        ({"path": "me/model"}, ["model.path=me/model@main"]),
        ({"path": "me/model@main"}, ["model.path=me/model"]),
        ({"path": "me/model"}, ["model.path=me/model", "model.revision=abc123"]),  # the commit that was used
    ],
)
def test_a_model_of_the_hub_is_found_however_its_revision_is_given(
    labeled: tuple[Path, pipeline.RunResult], tmp_path: Path, recorded: dict[str, str], asked: list[str]
) -> None:
    _, result = labeled
    copy = tmp_path / "out" / result.partition.name
    shutil.copytree(result.partition.uri, copy)
    path = copy / "runs" / f"{result.run}.json"
    record = json.loads(path.read_text())
    record["config"]["model"] |= recorded
    path.write_text(json.dumps(record | {"model_commit": "abc123"}))
    assert pipeline.find_partition(job(tmp_path, *asked)).uri == str(copy)
    with pytest.raises(StorageError, match="no run has labeled"):
        pipeline.find_partition(job(tmp_path, "model.path=me/model", "model.revision=other"))


def test_an_unknown_column_of_labels_is_named(labeled: tuple[Path, pipeline.RunResult]) -> None:
    _, result = labeled
    with pytest.raises(StorageError, match=r"a\.tar\.parquet: has no column lable"):
        next(iter(result.partition.read_labels(["key", "lable"])))


def test_a_folder_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not a partition"):
        pipeline.open_partition(str(tmp_path))


def test_a_wrong_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"output\.topkk=1: unknown field"):
        pipeline.load_job_config(None, ["output.topkk=1"])


def test_reading_labels_imports_neither_torch_nor_ray(labeled: tuple[Path, pipeline.RunResult]) -> None:
    root, result = labeled
    code = f"""
import sys
import pipeline
partition = pipeline.open_partition({result.partition.uri!r})
assert sum(table.num_rows for table in partition.read_labels(["label"])) == 8
fields = {[f"output.uri={root}/out", "input.uri=x", "model.path=fashion-mnist"]!r}
config = pipeline.load_job_config(None, fields)
assert pipeline.find_partition(config).uri == partition.uri
heavy = {{"torch", "ray", "transformers"}} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
