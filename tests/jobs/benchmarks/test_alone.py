"""The stages alone: what each is given to do, and how its rate is taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.benchmarks import alone
from jobs.benchmarks.alone import pipeline_resources, processes, rate_of_calls, spread
from jobs.benchmarks.own_contender import task_config
from jobs.benchmarks.peers import Task
from pipeline.classify.checkpoint import open_checkpoint
from pipeline.storage import Storage

pytestmark = pytest.mark.slow


def test_every_process_has_tars_of_its_own_if_there_are_enough() -> None:
    assert spread(["a", "b", "c", "d", "e"], 2) == [["a", "c", "e"], ["b", "d"]]
    assert spread(["a"], 3) == [["a"]] * 3


def test_reading_is_measured_in_as_many_processes_as_there_are_cores(images: Path) -> None:
    tars = sorted(map(str, images.iterdir()))
    with processes(2) as rate:
        assert [rate(_tars_times_100, tars), rate(_tars_times_100, tars[:1])] == [200, 200]


def _tars_times_100(tars: list[str]) -> float:
    alone._barrier.wait(200)  # passes with both processes only
    return 100.0 * len(tars)


def test_calls_are_under_way_at_once_and_all_but_the_first_one_count() -> None:
    device, lock = threading.Lock(), threading.Lock()
    begun = [0, 0]  # now, and at the most

    def call() -> int:
        with lock:
            begun[0] += 1
            begun[1] = max(begun)
        with device:  # one after the other
            time.sleep(0.02)
        with lock:
            begun[0] -= 1
        return 10

    rate = rate_of_calls(call, at_once=3, seconds=0.5)
    assert begun == [0, 3]
    assert 50 < rate <= 500


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [((), (4096, 2)), (("read.chunk_images=8", "classify.chunks_at_once=3"), (256, 3))],
)
def test_the_engine_gets_a_chunk_of_the_pipeline_but_four_batches_at_the_least(
    images: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], expected: tuple[int, int]
) -> None:
    calls = []

    def rate_of_calls(call: Callable[[], int], at_once: int) -> float:
        calls.append((call(), at_once))
        return 1.0

    monkeypatch.setattr(alone, "rate_of_calls", rate_of_calls)
    (images / "a.tar").unlink()  # it has an image that is none
    task = Task(
        tars=str(images),
        files="",
        extension="png",
        model="fashion-mnist",
        size=28,
        output="labels",
        events="",
        batch_size=64,
        device="cpu",
        precision="fp32",
        cores=2,
        overrides=overrides,
    )
    config, checkpoint = task_config(task), open_checkpoint(Storage(), task.model)
    alone._engine_rate(task, config, checkpoint, pipeline_resources(task, config, checkpoint))
    assert calls == [expected]
