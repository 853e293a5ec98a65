"""Where the time of a run goes: what each stage did, how long it took, and which of them bound the run.

Stages measure themselves, chunks carry the metrics, and the driver adds them up.
"""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass

STORAGE, DECODE, CLASSIFY, COMMIT = STAGES = ("storage", "decode", "classify", "commit")

#: Seconds of classifying from which on shares tell what bound a run: its first chunks were read and decoded
#: before, which counts as work too.
_TELLING_S = 10.0
#: Below this share of its time, even the busiest stage is not what a run waits for.
_BOUND_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class StageMetrics:
    """What a stage measured while it processed a chunk, or the sum over many chunks.

    Attributes:
        images: images that came to the stage.
        bytes: bytes that the stage passed on: encoded images, pixels, labels, or a file.
        busy_s, wait_s: seconds in which its workers worked, and waited for work.
        gpu_busy, gpu_samples: sum and number of the samples of GPU utilization, each from 0 to 1.
    """

    images: int = 0
    bytes: int = 0
    busy_s: float = 0.0
    wait_s: float = 0.0
    decoded_on_gpu: int = 0
    gpu_busy: float = 0.0
    gpu_samples: int = 0

    def __add__(self, other: StageMetrics) -> StageMetrics:
        return StageMetrics(*map(operator.add, astuple(self), astuple(other)))

    @property
    def gpu_utilization(self) -> float | None:
        """Share of the time in which GPUs were busy, on average; None where there are no samples."""
        return round(self.gpu_busy / self.gpu_samples, 3) if self.gpu_samples else None


def add_metrics(total: dict[str, StageMetrics], more: Mapping[str, StageMetrics]) -> None:
    """Adds stage metrics, by stage, to a total."""
    for stage, metrics in more.items():
        total[stage] = total.get(stage, StageMetrics()) + metrics


class StageTimer:
    """Measures the seconds in which a worker works (`with meter:`), and in which it waits for work.

    Several threads may work at the same time: the worker waits while none of them works.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._since = time.perf_counter()
        self._busy = self._wait = 0.0

    def __enter__(self) -> None:
        self._turn(1)

    def __exit__(self, *failure: object) -> None:
        self._turn(-1)

    def collect(self, images: int = 0, bytes: int = 0) -> StageMetrics:
        """Returns these counts with the seconds measured since the last call."""
        self._turn(0)
        with self._lock:
            metrics = StageMetrics(images, bytes, self._busy, self._wait)
            self._busy = self._wait = 0.0
        return metrics

    def _turn(self, step: int) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._inside:
                self._busy += now - self._since
            else:
                self._wait += now - self._since
            self._since = now
            self._inside += step


@dataclass(frozen=True)
class StageSummary:
    """One stage's part in a run; `images` and `bytes` as in `StageMetrics`.

    Attributes:
        busy_s, wait_s: seconds in which its workers worked, and could have worked, summed over the workers.
        workers: number of workers that could work at once.
        share_busy: fraction of these seconds that are busy.
    """

    images: int
    busy_s: float
    wait_s: float
    bytes: int
    workers: float
    share_busy: float

    @property
    def seconds(self) -> float:
        """Seconds that each of its workers worked or waited."""
        return (self.busy_s + self.wait_s) / self.workers


def summarize_stages(
    metrics: Mapping[str, StageMetrics], workers: Mapping[str, int], seconds: float
) -> dict[str, StageSummary]:
    """Each stage's part in a run.

    Args:
        metrics: sums over the run, by stage.
        workers: of each stage except `classify`, whose actors measure how long they waited.
        seconds: the run's, from its first work at a classifier to its last result.
    """
    figures = {}
    for stage in STAGES:
        sums = metrics.get(stage, StageMetrics())
        busy, wait = sums.busy_s, sums.wait_s
        if stage in workers:
            count: float = workers[stage]
            wait = max(0.0, count * seconds - busy)
        else:
            count = (busy + wait) / seconds if seconds else 0.0
        share = round(busy / (busy + wait), 4) if busy + wait else 0.0
        times = round(busy, 3), round(wait, 3)
        figures[stage] = StageSummary(sums.images, *times, sums.bytes, round(count, 2), share)
    return figures


def is_long_enough(figures: Mapping[str, StageSummary]) -> bool:
    """Whether a run was long enough to tell what bound it."""
    return min((stage.seconds for stage in figures.values() if stage.workers), default=0.0) >= _TELLING_S


def describe_bottleneck(figures: Mapping[str, StageSummary]) -> str:
    """Says in one line which stage the others waited for, where the run was long enough to tell."""
    if not is_long_enough(figures):
        return "not known: the run was too short to tell"
    by_share = sorted(figures, key=lambda stage: figures[stage].share_busy, reverse=True)
    shares = [f"{stage} {figures[stage].share_busy:.0%}" for stage in by_share]
    busiest = by_share[0]
    if figures[busiest].share_busy < _BOUND_SHARE:
        return f"no stage (busy: {', '.join(shares)}): starting and scheduling took the rest"
    return f"{busiest}, busy {figures[busiest].share_busy:.0%} of the time ({', '.join(shares[1:])})"
