"""The stages alone: what each is given to do, and how its rate is taken."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cvt.checkpoints import load_checkpoint
from jobs.benchmarks.contenders import Task, task_config
from jobs.benchmarks.stages import on_every_core, pipeline_resources, rate_of_calls, resident_images


@pytest.mark.slow
def test_shares_run_in_a_process_on_every_core(images: Path) -> None:
    tars = sorted(map(str, images.iterdir()))
    assert on_every_core(2, tars_times_100, tars) == 200  # one tar each
    assert on_every_core(2, tars_times_100, tars[:1]) == 200  # both have the same


def tars_times_100(barrier: Any, tars: list[str]) -> float:
    barrier.wait(200)  # passes with both processes only
    return 100.0 * len(tars)


def test_calls_overlap_and_all_but_the_first_count() -> None:
    device, lock = threading.Lock(), threading.Lock()
    running = [0, 0]  # now, and maximum

    def call() -> int:
        with lock:
            running[0] += 1
            running[1] = max(running)
        with device:  # one after the other
            time.sleep(0.02)
        with lock:
            running[0] -= 1
        return 10

    rate = rate_of_calls(call, at_once=3, seconds=0.5)
    assert running == [0, 3]
    assert 50 < rate <= 500


@pytest.mark.parametrize(("overrides", "expected"), [((), 4096), (("read.chunk_images=8",), 256)])
def test_engine_gets_a_chunk_but_at_least_four_batches(
    images: Path, task: Task, overrides: tuple[str, ...], expected: int
) -> None:
    task = replace(task, tars=str(images), batch_size=64, overrides=overrides)
    checkpoint = load_checkpoint(task.model)
    resources = pipeline_resources(task, task_config(task), checkpoint)
    found = resident_images(task.tars, checkpoint.preprocessor, resources)
    assert found.shape == (expected, 28, 28, 3)
    assert (found[5:10] == found[:5]).all()
