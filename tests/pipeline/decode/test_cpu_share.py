"""Tests of the division of JPEGs between CPU and GPU, with simulated clocks."""

from __future__ import annotations

import heapq
import random

import pytest

from jobs.benchmarks.gpu_rates import balanced_share
from pipeline.decode.gpu import is_for_cpu

FILES = [random.Random(number).randbytes(2000) for number in range(20_000)]


def simulate(share: float, threads: int, cpu_us: int, gpu_us: int) -> tuple[int, int]:
    """Returns when the CPU threads and the GPU have decoded all files, in microseconds."""
    clocks, gpu = [0] * threads, 0
    for data in FILES:
        if is_for_cpu(data, share):
            heapq.heapreplace(clocks, clocks[0] + cpu_us)  # the thread that is free first
        else:
            gpu += gpu_us
    return max(clocks), gpu


@pytest.mark.parametrize(
    ("threads", "cpu_us", "gpu_us"), [(2, 6000, 200), (8, 4000, 500), (30, 3000, 150), (4, 1000, 4000)]
)
def test_cpu_and_gpu_finish_together_at_the_balanced_share(threads: int, cpu_us: int, gpu_us: int) -> None:
    share = balanced_share(threads * 1e6 / cpu_us, 1e6 / gpu_us)
    cpu, gpu = simulate(share, threads, cpu_us, gpu_us)
    assert cpu == pytest.approx(gpu, rel=0.1)
    best = max(cpu, gpu)
    both = threads / cpu_us + 1 / gpu_us  # images per microsecond if neither ever waits
    assert best == pytest.approx(len(FILES) / both, rel=0.07)
    for other in (0.0, 0.8 * share, 1.2 * share):
        assert best < max(simulate(other, threads, cpu_us, gpu_us))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.9])
def test_share_is_the_fraction_of_files_in_any_part_of_a_dataset(share: float) -> None:
    for part in (FILES, FILES[:5000], FILES[1::2]):
        fraction = sum(is_for_cpu(data, share) for data in part) / len(part)
        assert fraction == pytest.approx(share, abs=0.01)


def test_larger_share_keeps_the_files_of_the_smaller_one() -> None:
    assert all(is_for_cpu(data, 0.5) for data in FILES if is_for_cpu(data, 0.2))
