"""Stage metrics: the work and the time of each stage, and the stage that limits the throughput of a run.

Each stage measures itself, chunks carry the metrics, and the driver sums them.
"""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass

STORAGE, DECODE, CLASSIFY, COMMIT = STAGES = ("storage", "decode", "classify", "commit")

#: Minimum seconds from the first result to the last of a run with a steady state. In a shorter run, the first
#: chunks, which are read and decoded before the measurement starts, distort rate and busy fractions.
_MIN_SECONDS = 10.0
#: Minimum busy fraction of a stage that limits the throughput.
_MIN_BUSY = 0.5


@dataclass(frozen=True, slots=True)
class StageMetrics:
    """Metrics of a stage for one chunk, or the sum over many chunks.

    Attributes:
        images: Number of input images.
        bytes: Number of output bytes: encoded images, pixels, labels, or a file.
        busy_s, wait_s: Seconds that the workers worked, and waited for work.
        decoded_on_gpu: Number of images that the GPU decoded.
        gpu_busy, gpu_samples: Sum and number of GPU utilization samples, each from 0 to 1.
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
        """Mean GPU utilization, from 0 to 1; None without samples."""
        return round(self.gpu_busy / self.gpu_samples, 3) if self.gpu_samples else None


class StageTimer:
    """Measures the seconds that a worker is busy (`with timer:`), and the seconds that it waits.

    Several threads may be busy at the same time. The worker waits while no thread is busy.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy_threads = 0
        self._since = time.perf_counter()
        self._busy = self._wait = 0.0

    def __enter__(self) -> None:
        self._advance(1)

    def __exit__(self, *failure: object) -> None:
        self._advance(-1)

    def collect(self, images: int = 0, bytes: int = 0) -> StageMetrics:
        """Returns metrics with these counts and the seconds since the last call."""
        self._advance(0)
        with self._lock:
            metrics = StageMetrics(images, bytes, self._busy, self._wait)
            self._busy = self._wait = 0.0
        return metrics

    def _advance(self, step: int) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._busy_threads:
                self._busy += now - self._since
            else:
                self._wait += now - self._since
            self._since = now
            self._busy_threads += step


def summarize_stages(
    metrics: Mapping[str, StageMetrics], workers: Mapping[str, int], seconds: float
) -> dict[str, dict[str, float]]:
    """Returns `images`, `busy_s`, `wait_s`, `bytes`, `workers` and `fraction_busy` of each stage.

    Args:
        metrics: Sums over the run, by stage.
        workers: Number of workers of each stage except `classify`, whose actors measure their idle time.
        seconds: Duration of the run, from the first classification to the last result.
    """
    summaries = {}
    for stage in STAGES:
        sums = metrics.get(stage, StageMetrics())
        busy, wait = sums.busy_s, sums.wait_s
        if stage in workers:
            count: float = workers[stage]
            wait = max(0.0, count * seconds - busy)
        else:
            count = (busy + wait) / seconds if seconds else 0.0
        summaries[stage] = {
            "images": sums.images,
            "busy_s": round(busy, 3),
            "wait_s": round(wait, 3),
            "bytes": sums.bytes,
            "workers": round(count, 2),
            "fraction_busy": round(busy / (busy + wait), 4) if busy + wait else 0.0,
        }
    return summaries


def steady_rate(images: int, seconds: float) -> float | None:
    """Returns the images per second after the first result; None if the time is too short."""
    return images / seconds if seconds >= _MIN_SECONDS else None


def describe_bottleneck(summaries: Mapping[str, Mapping[str, float]]) -> str:
    """Returns one line that names the stage that limited the throughput, if known."""
    used = [stage for stage in summaries.values() if stage["workers"]]
    seconds = min(((each["busy_s"] + each["wait_s"]) / each["workers"] for each in used), default=0.0)
    if seconds < _MIN_SECONDS:
        return "unknown: the run was too short"
    busy = {stage: summary["fraction_busy"] for stage, summary in summaries.items()}
    busiest, *others = sorted(busy, key=lambda stage: busy[stage], reverse=True)
    fractions = [f"{stage} {busy[stage]:.0%}" for stage in (busiest, *others)]
    if busy[busiest] < _MIN_BUSY:
        return f"no stage (busy: {', '.join(fractions)}): startup and scheduling took the remaining time"
    return f"{busiest}, busy {busy[busiest]:.0%} of the time ({', '.join(fractions[1:])})"
