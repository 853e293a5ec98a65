"""Stage metrics: timers, sums, and the bottleneck of a run."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.dataflow.gpu_meter import GpuMeter
from pipeline.statistics import (
    CLASSIFY,
    COMMIT,
    DECODE,
    STORAGE,
    StageMetrics,
    StageTimer,
    describe_bottleneck,
    steady_rate,
    summarize_stages,
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that timers read; change the only item to advance the time."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_busy_and_waiting_seconds_are_collected_once(clock: list[float]) -> None:
    timer = StageTimer()
    clock[0] += 1
    with timer:
        clock[0] += 4
    clock[0] += 2
    assert timer.collect(bytes=7) == StageMetrics(bytes=7, busy_s=4, wait_s=3)
    assert timer.collect() == StageMetrics()


def test_failing_work_counts_as_busy(clock: list[float]) -> None:
    timer = StageTimer()

    def work() -> None:
        with timer:
            clock[0] += 4
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        work()
    assert timer.collect().busy_s == 4


def test_concurrent_threads_count_once(clock: list[float]) -> None:
    timer = StageTimer()
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with timer:
            inside.set()
            leave.wait(10)

    with timer:
        other = threading.Thread(target=work)
        other.start()
        assert inside.wait(10)
        clock[0] += 3
    clock[0] += 2
    leave.set()
    other.join(10)
    clock[0] += 1
    assert timer.collect() == StageMetrics(busy_s=5, wait_s=1)


METRICS = {
    STORAGE: StageMetrics(images=400, bytes=1000, busy_s=2.0),
    DECODE: StageMetrics(images=390, busy_s=10.0),
    CLASSIFY: StageMetrics(images=380, busy_s=19.0, wait_s=1.0),
    COMMIT: StageMetrics(busy_s=0.5),
}


def test_waiting_time_follows_from_the_number_of_workers() -> None:
    figures = summarize_stages(METRICS, {STORAGE: 2, DECODE: 4, COMMIT: 1}, seconds=10.0)
    assert [*figures[STORAGE]] == ["images", "busy_s", "wait_s", "bytes", "workers", "fraction_busy"]
    assert [*figures[STORAGE].values()] == [400, 2.0, 18.0, 1000, 2, 0.1]
    assert [*figures[DECODE].values()] == [390, 10.0, 30.0, 0, 4, 0.25]
    assert [*figures[CLASSIFY].values()] == [380, 19.0, 1.0, 0, 2.0, 0.95]
    assert (
        describe_bottleneck(figures) == "classify, busy 95% of the time (decode 25%, storage 10%, commit 5%)"
    )


@pytest.mark.parametrize("stage", [STORAGE, DECODE, COMMIT])
def test_busiest_stage_is_the_bottleneck(stage: str) -> None:
    metrics = {CLASSIFY: StageMetrics(busy_s=1.0, wait_s=9.0), stage: StageMetrics(busy_s=9.0)}
    figures = summarize_stages(metrics, {STORAGE: 1, DECODE: 1, COMMIT: 1}, seconds=10.0)
    assert describe_bottleneck(figures).startswith(f"{stage}, busy 90% of the time (classify 10%")


def test_no_stage_is_the_bottleneck_of_a_run_that_mostly_starts() -> None:
    figures = summarize_stages(METRICS, {STORAGE: 2, DECODE: 4, CLASSIFY: 4, COMMIT: 1}, seconds=10.0)
    assert describe_bottleneck(figures).startswith("no stage (busy: classify 48%, decode 25%")


def test_gpu_utilization_is_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([50, 100])
    monkeypatch.setattr("torch.cuda.utilization", lambda: next(answers))
    monkeypatch.setattr("pipeline.dataflow.gpu_meter._INTERVAL_S", 0.0)
    meter, metrics, deadline = GpuMeter(), StageMetrics(), time.monotonic() + 10
    while metrics.gpu_samples < 2:
        metrics += meter.collect()
        assert time.monotonic() < deadline
    assert metrics.gpu_utilization == 0.75


def test_gpu_utilization_is_none_without_a_gpu() -> None:
    assert StageMetrics().gpu_utilization is None


def test_run_without_results_has_stage_summaries() -> None:
    figures = summarize_stages({}, {STORAGE: 1, DECODE: 1, COMMIT: 1}, seconds=0.0)
    assert {f["fraction_busy"] for f in figures.values()} == {0.0}
    assert describe_bottleneck(figures) == "unknown: the run was too short"


def test_bottleneck_of_a_short_run_is_unknown() -> None:
    metrics = {
        STORAGE: StageMetrics(busy_s=3.0),
        DECODE: StageMetrics(busy_s=2.0),
        CLASSIFY: StageMetrics(busy_s=0.4, wait_s=0.1),
    }
    figures = summarize_stages(metrics, {STORAGE: 1, DECODE: 2, COMMIT: 4}, seconds=0.5)
    assert figures[STORAGE]["fraction_busy"] == 1
    assert describe_bottleneck(figures) == "unknown: the run was too short"


def test_steady_rate_needs_ten_seconds() -> None:
    assert steady_rate(1000, 9.9) is None
    assert steady_rate(1000, 10.0) == 100.0
