"""Runs of contenders: what is counted and timed, and how they end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.benchmarks.contenders import OURS, Task, task_config
from jobs.benchmarks.figures import BenchmarkError
from jobs.benchmarks.runs import (
    check_labels,
    in_local_s3,
    read_events,
    run_contender,
    run_module,
    steady_rate,
)
from jobs.verify import read_images
from pipeline.storage import Storage
from tests.makers import make_image, make_samples, make_tar

pytestmark = pytest.mark.slow


def write_labels(folder: Path, keys: list[str], labels: list[str | None] | None = None) -> None:
    folder.mkdir(parents=True)
    columns: dict[str, Any] = {"key": keys, "label": labels or ["a"] * len(keys), "score": [0.5] * len(keys)}
    pq.write_table(pa.table(columns), folder / "labels.parquet")


def test_keys_may_name_folder_and_extension(tmp_path: Path) -> None:
    write_labels(tmp_path / "out", ["000000001", "file:///somewhere/000000000.jpg"])
    check_labels("dataloader", str(tmp_path / "out"), 2)


@pytest.mark.parametrize(
    ("keys", "labels", "message"),
    [
        (["000000000", "000000001"], None, "of 3 images, found 2 labels of 2 images"),
        (["000000000", "000000001", "000000001"], None, "3 labels of 2 images"),
        (["000000000", "000000001", "000000003"], None, "3 labels of 2 images"),
        (["000000000", "000000001", "000000002"], ["a", None, "a"], "without a label"),
    ],
)
def test_lost_or_repeated_images_are_refused(
    tmp_path: Path, keys: list[str], labels: list[str | None] | None, message: str
) -> None:
    write_labels(tmp_path / "out", keys, labels)
    with pytest.raises(BenchmarkError, match=message):
        check_labels("dataloader", str(tmp_path / "out"), 3)


def test_steady_rate_is_from_the_first_batch_to_the_last(task: Task) -> None:
    events = Path(task.events)
    events.write_text("32 10.0\n0 1.0\n32 14.0\n8 15.0\n32 12.0\n")  # processes may write out of order
    assert steady_rate("ray", read_events(task)) == 72 / 5
    events.write_text("32 10.0\n")
    with pytest.raises(BenchmarkError, match="too few images"):
        steady_rate("ray", read_events(task))


def test_contenders_start_without_heavy_imports() -> None:
    heavy = "import sys; print({'ray', 'torch', 'transformers'} & set(sys.modules))"
    command = [sys.executable, "-c", f"import jobs.benchmarks.contenders; {heavy}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.slow
def test_contender_that_fails_or_hangs_is_ended(task: Task) -> None:
    assert run_module(["contenders", "unheard-of"], task, 120) == "KeyError: 'unheard-of'"
    assert run_module(["stages"], task, 0.2) == "not done after 0 s"


def test_pipeline_takes_one_gpu_unless_overridden(task: Task) -> None:
    on_gpu = replace(task, device="cuda")
    assert task_config(task).classify.max_actors is None
    assert task_config(on_gpu).classify.max_actors == 1
    assert task_config(replace(on_gpu, overrides=("classify.max_actors=4",))).classify.max_actors == 4


def test_tars_and_labels_can_be_in_a_local_s3_server(task: Task) -> None:
    Path(task.tars).mkdir()
    for name in ("00000.tar", "00001.tar"):
        (Path(task.tars) / name).write_bytes(make_tar(make_samples(3, labels=False)))
    with mock.patch.dict(os.environ):
        with in_local_s3(task) as there:
            assert [*read_images(there.tars)] == [*read_images(task.tars)]
            config = task_config(there)
            assert (config.input.uri, config.output.uri) == (there.tars, there.output)
            for name, keys in (("0.parquet", ["000000000"]), ("1.parquet", ["000000001"])):
                file = pa.BufferOutputStream()
                pq.write_table(pa.table({"key": keys, "label": ["a"], "score": [0.5]}), file)
                uri = f"{there.output}/model=m-12345678/predictions/{name}"
                Storage().write(uri, file.getvalue().to_pybytes())
            check_labels(OURS, there.output, 2)
            with pytest.raises(BenchmarkError, match="of 3 images, found 2 labels of 2 images"):
                check_labels(OURS, there.output, 3)
            address = os.environ["AWS_ENDPOINT_URL_S3"].removeprefix("http://").split(":")
        with socket.socket() as probe:
            assert probe.connect_ex((address[0], int(address[1]))) != 0


@pytest.mark.slow
def test_pipeline_labels_from_s3_to_s3(task: Task) -> None:
    Path(task.tars).mkdir()
    members = [(f"{i:09d}.jpg", make_image(i)) for i in range(20)]
    for start in (0, 10):
        (Path(task.tars) / f"{start}.tar").write_bytes(make_tar(members[start : start + 10]))
    overrides = "ray.address=in-process", "read.chunk_images=5"
    with mock.patch.dict(os.environ), in_local_s3(task) as there:
        run = run_contender(OURS, replace(there, overrides=overrides), 20, 400)
    assert run.failure is None
    assert run.record["config"]["input"]["uri"] == there.tars
    assert run.first_commit is not None
    assert 0 < run.first_labels <= run.first_commit < run.seconds
