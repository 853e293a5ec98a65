"""Runs of contenders: what is counted and timed of them, and how they end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.benchmarks import contenders
from jobs.benchmarks.contenders import (
    OURS,
    WrongCountError,
    check_labels,
    in_local_s3,
    read_events,
    run_contender,
    run_module,
    steady_rate,
)
from jobs.benchmarks.data import read_images
from jobs.benchmarks.own_contender import task_config
from jobs.benchmarks.peers import Task
from pipeline.storage import Storage
from tests.makers import make_image, make_samples, make_tar

pytestmark = pytest.mark.slow


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(
        tars=str(tmp_path / "tars"),
        files="",
        extension="jpg",
        model="fashion-mnist",
        size=28,
        output=str(tmp_path / "output"),
        events=str(tmp_path / "events"),
        batch_size=1,
        device="cpu",
        precision="fp32",
        cores=1,
    )


def write_labels(folder: Path, keys: list[str], labels: list[str | None] | None = None) -> None:
    folder.mkdir(parents=True)
    columns: dict[str, Any] = {"key": keys, "label": labels or ["a"] * len(keys), "score": [0.5] * len(keys)}
    pq.write_table(pa.table(columns), folder / "labels.parquet")


def test_labels_of_every_image_are_accepted_whatever_folder_the_keys_have(tmp_path: Path) -> None:
    write_labels(tmp_path / "out", ["000000001", "file:///somewhere/000000000.jpg"])
    check_labels("dataloader", str(tmp_path / "out"), 2)


@pytest.mark.parametrize(
    ("keys", "labels", "message"),
    [
        (["000000000", "000000001"], None, "2 labels of 2 images came out, of 3 images"),
        (["000000000", "000000001", "000000001"], None, "3 labels of 2 images"),
        (["000000000", "000000001", "000000003"], None, "3 labels of 2 images"),
        (["000000000", "000000001", "000000002"], ["a", None, "a"], "without a label"),
    ],
)
def test_a_contender_that_loses_an_image_is_refused(
    tmp_path: Path, keys: list[str], labels: list[str | None] | None, message: str
) -> None:
    write_labels(tmp_path / "out", keys, labels)
    with pytest.raises(WrongCountError, match=message):
        check_labels("dataloader", str(tmp_path / "out"), 3)


def test_the_steady_rate_is_from_the_first_batch_to_the_last(task: Task) -> None:
    events = Path(task.events)
    events.write_text("32 10.0\n0 1.0\n32 14.0\n8 15.0\n32 12.0\n")  # processes may write out of turn
    assert steady_rate("ray", read_events(task)) == 72 / 5
    events.write_text("32 10.0\n")
    with pytest.raises(WrongCountError, match="too few images"):
        steady_rate("ray", read_events(task))


def test_start_up_is_timed_from_the_start_of_the_process(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], task: Task, timeout: float) -> tuple[float, None]:
        partition = Path(task.output) / "model=m-12345678"
        write_labels(partition / "predictions", ["000000000", "000000001"])
        (partition / "runs").mkdir()
        (partition / "runs" / "1.json").write_text(json.dumps({"seconds": {"first_commit": 3.0}}))
        now = time.monotonic()
        lines = [f"1 {now + 9}", f"1 {now + 7}"]
        if command == ["jobs.benchmarks.own_contender"]:
            lines.append(f"0 {now + 2}")  # the clock of the record starts
        Path(task.events).write_text("\n".join(lines))
        return 10.0, None

    monkeypatch.setattr(contenders, "run_module", run)
    ours, peer = (run_contender(name, task, 2, 60) for name in (OURS, "ray"))
    assert (ours.seconds, ours.rate) == (10.0, pytest.approx(0.5))
    assert [ours.first_labels, peer.first_labels] == [pytest.approx(7, abs=0.5)] * 2
    assert (ours.first_commit, peer.first_commit) == (pytest.approx(5, abs=0.5), None)
    assert not Path(task.output).exists()


def test_the_pipeline_begins_with_no_more_imports_than_its_own_command() -> None:
    heavy = "import sys; print({'ray', 'transformers'} & set(sys.modules))"
    command = [sys.executable, "-c", f"import jobs.benchmarks.own_contender; {heavy}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_contender_that_hangs_or_fails_is_ended_and_says_so(task: Task) -> None:
    assert run_module(["jobs.benchmarks.peers", "unheard-of"], task, 60)[1] == "KeyError: 'unheard-of'"
    assert run_module(["jobs.benchmarks.alone"], task, 0.2) == (0.2, "not done after 0 s")


def test_the_pipeline_takes_one_gpu_as_the_others_do_unless_it_is_told_otherwise(task: Task) -> None:
    on_gpu = replace(task, device="cuda")
    assert task_config(task).classify.max_actors is None
    assert task_config(on_gpu).classify.max_actors == 1
    assert task_config(replace(on_gpu, overrides=("classify.max_actors=4",))).classify.max_actors == 4


def test_from_s3_the_tars_are_in_a_server_that_ends_and_labels_there_are_counted(task: Task) -> None:
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
            with pytest.raises(WrongCountError, match="2 labels of 2 images came out, of 3"):
                check_labels(OURS, there.output, 3)
            contenders._remove(there.output)
            assert [*Storage().list(there.output)] == []
            address = os.environ["AWS_ENDPOINT_URL_S3"].removeprefix("http://").split(":")
        with socket.socket() as probe:
            assert probe.connect_ex((address[0], int(address[1]))) != 0


def test_the_pipeline_labels_from_s3_to_s3(task: Task) -> None:
    Path(task.tars).mkdir()
    members = [(f"{i:09d}.jpg", make_image(i)) for i in range(20)]
    for start in (0, 10):
        (Path(task.tars) / f"{start}.tar").write_bytes(make_tar(members[start : start + 10]))
    with mock.patch.dict(os.environ), in_local_s3(task) as there:
        run = run_contender(OURS, there, 20, 200)
    assert (run.failure, run.images, run.in_s3) == (None, 20, True)
    assert run.record is not None
    assert run.record["config"]["input"]["uri"] == there.tars
    assert run.first_commit is not None
    assert 0 < run.first_labels <= run.first_commit < run.seconds
