"""Tests of the runs of contenders: counts, rates and failures."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cvt.preprocessing import Preprocessor
from jobs.benchmarks.contenders import IN_PROCESS, Task, engine_alone, task_config
from jobs.benchmarks.end_to_end import make_dataset
from jobs.benchmarks.figures import BenchmarkError
from jobs.benchmarks.runs import (
    ContenderResult,
    check_labels,
    contender_rate,
    read_events,
    run_contender,
    run_process,
)

pytestmark = pytest.mark.slow


def write_labels(folder: Path, keys: list[str], labels: list[str | None] | None = None) -> None:
    folder.mkdir(parents=True)
    columns: dict[str, Any] = {"key": keys, "label": labels or ["a"] * len(keys), "score": [0.5] * len(keys)}
    pq.write_table(pa.table(columns), folder / "labels.parquet")


def test_keys_may_have_folder_and_extension(tmp_path: Path) -> None:
    write_labels(tmp_path / "out", ["000000001", "file:///somewhere/000000000.jpg"])
    check_labels("dataloader", str(tmp_path / "out"), 2)


@pytest.mark.parametrize(
    ("keys", "labels", "message"),
    [
        (["000000000", "000000001"], None, "of 3 images, found 2 rows for 2 images"),
        (["000000000", "000000001", "000000001"], None, "3 rows for 2 images"),
        (["000000000", "000000001", "000000003"], None, "3 rows for 2 images"),
        (["000000000", "000000001", "000000002"], ["a", None, "a"], "have no label"),
    ],
)
def test_lost_or_repeated_images_fail(
    tmp_path: Path, keys: list[str], labels: list[str | None] | None, message: str
) -> None:
    write_labels(tmp_path / "out", keys, labels)
    with pytest.raises(BenchmarkError, match=message):
        check_labels("dataloader", str(tmp_path / "out"), 3)


def test_contender_rate_is_from_the_first_batch_to_the_last(task: Task) -> None:
    task.events.write_text("32 10.0\n32 18.0\n8 20.0\n32 12.0\n")  # processes may write out of order
    assert contender_rate(read_events(task)) == 72 / 10
    task.events.write_text("32 10.0\n32 18.0\n")  # too short for a steady state
    assert contender_rate(read_events(task)) is None


def test_run_of_pipeline_is_counted_and_timed(images: Path, task: Task) -> None:
    make_dataset(str(images), Path(task.tars), Preprocessor.published(), 5, cores=1)
    result = ContenderResult(IN_PROCESS, 5)
    run_contender(result, task, 120)
    assert result.failure is None
    assert 0 < result.first_labels_s[0] < result.seconds[0]
    with pytest.raises(BenchmarkError, match="of 6 images, found 5 rows for 5 images"):
        check_labels(IN_PROCESS, task.output, 6)


def test_failure_of_pipeline_is_reported(task: Task) -> None:
    reason = run_process(IN_PROCESS, replace(task, overrides=("decode.nothing=1",)), 120)
    assert "decode.nothing=1: unknown field" in (reason or "")


def test_contenders_start_without_heavy_imports() -> None:
    heavy = "import sys; print({'ray', 'torch', 'transformers'} & set(sys.modules))"
    command = [sys.executable, "-c", f"import jobs.benchmarks.contenders; {heavy}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.slow
def test_contender_that_fails_or_hangs_is_stopped(task: Task) -> None:
    assert run_process("unheard-of", task, 120) == "KeyError: 'unheard-of'"
    assert run_process("ray", task, 0.2) == "timed out after 0 s"


def test_pipeline_uses_one_gpu_unless_overridden(task: Task) -> None:
    on_gpu = replace(task, device="cuda")
    assert task_config(task).classify.max_actors is None
    assert task_config(on_gpu).classify.max_actors == 1
    assert task_config(replace(on_gpu, overrides=("classify.max_actors=4",))).classify.max_actors == 4


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [(("read.chunk_images=8",), 256), pytest.param((), 4096, marks=pytest.mark.long)],
)
def test_engine_call_has_one_chunk_or_four_batches(
    images: Path, task: Task, overrides: tuple[str, ...], expected: int
) -> None:
    task = replace(task, tars=str(images), batch_size=64, overrides=overrides)
    engine_alone(task, seconds=0.5)
    events = read_events(task)
    assert {count for _, count in events} == {expected}
    assert len(events) > 1
