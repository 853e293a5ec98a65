"""Tests of the command `compare`: output and exit statuses."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Config, load_config
from pipeline.statistics.comparison import TOTALS
from pipeline.storage import Storage
from tests.command import cvt_label
from tests.partitions import make_predictions, write_partition
from tests.pipeline.compare.test_label_sets import LABELS, make_models

SCHEMA = pa.schema(
    {
        "label": pa.string(),
        "label_id_a": pa.int32(),
        "label_id_b": pa.int32(),
        "count_a": pa.int64(),
        "count_b": pa.int64(),
        "fraction_a": pa.float64(),
        "fraction_b": pa.float64(),
        "psi": pa.float64(),
        "js_divergence": pa.float64(),
        "score_psi": pa.float64(),
        "compared_a": pa.int64(),
        "compared_b": pa.int64(),
        "same": pa.int64(),
    }
)


def write_labels(uri: str, *runs: list[int | None], record: object = None) -> list[str]:
    """Writes labels of one shard per run."""
    made = [{f"/in/{i}.tar": make_predictions(f"/in/{i}.tar", LABELS, run)} for i, run in enumerate(runs)]
    return write_partition(Storage(), uri, LABELS, made, {} if record is None else {"config": record})


def test_result_is_printed_and_written_and_limits_set_exit_status(bucket: str, storage: Storage) -> None:
    models = make_models(bucket, storage)
    output = f"{bucket}/cmp.parquet"
    done = cvt_label("compare", *models, "--output", output, "--max-psi", "0.1", "--min-agreement", 0.9)
    assert done.returncode == 7, done.stderr
    assert "66.7% of 6 images labeled in both" in done.stdout
    assert "matched by name: 1 only in A, 1 only in B" in done.stdout
    assert "[bold]hat" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "is more than 0.1" in done.stderr
    assert "agreement 0.6667 is less than 0.9" in done.stderr
    table = pq.read_table(io.BytesIO(storage.read(output)))
    assert table.schema.equals(SCHEMA)
    rows = {row["label"]: row for row in table.to_pylist()}
    assert (rows["bag"]["label_id_a"], rows["bag"]["label_id_b"]) == (1, None)
    assert (rows["coat"]["compared_a"], rows["coat"]["compared_b"], rows["coat"]["same"]) == (3, 2, 2)
    totals = json.loads(table.schema.metadata[TOTALS.encode()])
    assert (totals["compared"], totals["only_a"], totals["disagreements_uncounted"]) == (6, 7, 0)
    assert sum(row["psi"] for row in table.to_pylist()) == pytest.approx(totals["psi"])
    parts = [row["js_divergence"] for row in table.to_pylist()]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(totals["js_distance"] ** 2)


def test_copied_partition_compares_like_the_original(tmp_path: Path) -> None:
    """The manifest has the object versions of the original."""
    a, b, copy = (str(tmp_path / f"model={name}-00000000") for name in ("a", "b", "copy"))
    write_labels(a, [0, 1, 2, 2])
    write_labels(b, [0, 1, 2, 1])
    shutil.copytree(b, copy, copy_function=shutil.copyfile)
    for other in (b, copy):
        assert cvt_label("compare", a, other, "--min-agreement", 0.75).returncode == 0
        done = cvt_label("compare", a, other, "--min-agreement", 0.76)
        assert done.returncode == 7
        assert "agreement 0.75 is less than 0.76" in done.stderr


def test_labels_without_common_samples_end_with_4(tmp_path: Path) -> None:
    uri = str(tmp_path / "model=a-00000000")
    write_labels(uri, [None], [0, 1])
    missing = cvt_label("compare", uri, tmp_path)
    assert missing.returncode == 4
    assert f"{tmp_path}: not a partition" in missing.stderr
    disjoint = cvt_label("compare", uri, f"{uri}@latest", "--min-agreement", 0.5)
    assert disjoint.returncode == 4
    assert "no sample is labeled both here and in" in disjoint.stderr


def test_invalid_options_end_with_2(tmp_path: Path) -> None:
    uri = str(tmp_path / "model=a-00000000")
    write_labels(uri, [0])
    assert cvt_label("compare", uri, uri, "--drift-only", "--min-agreement", 1).returncode == 2
    assert cvt_label("compare", uri).returncode == 2
    assert cvt_label("compare", uri, "@latest").returncode == 2


def test_missing_previous_run_ends_with_0(tmp_path: Path) -> None:
    uri = str(tmp_path / "model=a-00000000")
    write_labels(uri, [0])
    done = cvt_label("compare", f"{uri}@previous", f"{uri}@latest", "--max-psi", 0.1)
    assert done.returncode == 0
    assert "nothing to compare" in done.stderr


def test_configuration_selects_the_partition_of_its_job(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"model: {{path: fashion-mnist}}\ninput: {{uri: /in}}\noutput: {{uri: {tmp_path}/out}}\n")
    uri, other = f"{tmp_path}/out/model=fashion-mnist-ffffffff", str(tmp_path / "model=b-11111111")
    record = load_config(Config, job, ()).model_dump(mode="json")
    ids = write_labels(uri, [0, 1, 2, 2], [0, 1, 1, 1], record=record)
    write_labels(other, [0, 1, 2, 1])
    whole = cvt_label("compare", other, "--config", job)
    assert whole.returncode == 0, whole.stderr
    assert [line.split() for line in whole.stdout.splitlines() if line.startswith(("A ", "B "))][-2:] == [
        ["A", other],
        ["B", uri],
    ]
    runs = cvt_label("compare", "@previous", "@latest", "--config", job)
    assert runs.returncode == 0, runs.stderr
    assert f"{uri}@{ids[0]}" in runs.stdout
    assert f"{uri}@{ids[1]}" in runs.stdout
