"""Where the time of a run goes: what each stage did, how long it took, and which of them bound the run.

Stages measure themselves, their figures ride in the chunks, and the driver adds them up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

STORAGE, DECODE, CLASSIFY, COMMIT = STAGES = ("storage", "decode", "classify", "commit")


#: Images that a GPU decoded, in a chunk's `spent`.
ON_GPU = f"{DECODE}.on_gpu"


logger = logging.getLogger("cvt_label")


#: Seconds of classifying from which on shares tell what bound a run: its first chunks were read and decoded
#: before, which counts as work too.
_TELLING_S = 10.0

#: Below this share of its time, even the busiest stage is not what a run waits for.
_BOUND_SHARE = 0.5


class Meter:
    """Seconds in which a worker of a stage works, `with meter:`, and in which it waits for work.

    Several threads may be at work at once: then it waits while none of them is.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._lock = threading.Lock()
        self._inside = 0
        self._since = time.perf_counter()
        self._busy = self._wait = 0.0

    def __enter__(self) -> None:
        self._turn(1)

    def __exit__(self, *failure: object) -> None:
        self._turn(-1)

    def taken(self, **counts: float) -> dict[str, float]:
        """What is measured since it was taken last, and `counts`, named as a chunk's `spent` has them."""
        self._turn(0)
        with self._lock:
            figures = {"busy_s": self._busy, "wait_s": self._wait} | counts
            self._busy = self._wait = 0.0
        return {f"{self._stage}.{name}": value for name, value in figures.items()}

    def _turn(self, step: int) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._inside:
                self._busy += now - self._since
            else:
                self._wait += now - self._since
            self._since = now
            self._inside += step


def gpu_utilisation(spent: Mapping[str, float]) -> float | None:
    """The share of the time in which GPUs were busy, on average; None where nobody measured it."""
    samples = spent.get("gpu.samples", 0.0)
    return round(spent["gpu.busy"] / samples, 3) if samples else None


@dataclass(frozen=True)
class StageFigures:
    """One stage's part in a run.

    Attributes:
        images: that came to it: of some, reading or decoding says already what is wrong with them.
        busy_s: seconds in which its workers worked, summed over them.
        wait_s: seconds in which they could have worked and didn't, likewise.
        bytes: that it passed on: encoded images, pixels, labels, and what was written.
        workers: that could work at once.
        share_busy: busy seconds of all, from 0 to 1.
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


def stage_figures(
    spent: Mapping[str, float], workers: Mapping[str, int], seconds: float
) -> dict[str, StageFigures]:
    """Adds up what the stages measured.

    Args:
        spent: seconds, images and bytes by stage, as `Meter.taken` names them.
        workers: of each stage, but of `classify`, whose actors know how long they waited.
        seconds: the run's, from its first work at a classifier to its last result.
    """
    figures = {}
    for stage in STAGES:
        busy = spent.get(f"{stage}.busy_s", 0.0)
        if stage in workers:
            count: float = workers[stage]
            wait = max(0.0, count * seconds - busy)
        else:
            wait = spent.get(f"{stage}.wait_s", 0.0)
            count = (busy + wait) / seconds if seconds else 0.0
        figures[stage] = StageFigures(
            images=int(spent.get(f"{stage}.images", 0)),
            busy_s=round(busy, 3),
            wait_s=round(wait, 3),
            bytes=int(spent.get(f"{stage}.bytes", 0)),
            workers=round(count, 2),
            share_busy=round(busy / (busy + wait), 4) if busy + wait else 0.0,
        )
    return figures


def is_telling(figures: Mapping[str, StageFigures]) -> bool:
    """Whether a run was long enough to tell what bound it."""
    return min((stage.seconds for stage in figures.values() if stage.workers), default=0.0) >= _TELLING_S


def bound_by(figures: Mapping[str, StageFigures]) -> str:
    """Says in one line which stage the others waited for, where the run was long enough to tell."""
    if not is_telling(figures):
        return "not known: the run was too short to tell"
    by_share = sorted(figures, key=lambda stage: figures[stage].share_busy, reverse=True)
    shares = [f"{stage} {figures[stage].share_busy:.0%}" for stage in by_share]
    busiest = by_share[0]
    if figures[busiest].share_busy < _BOUND_SHARE:
        return f"no stage (busy: {', '.join(shares)}): starting and scheduling took the rest"
    return f"{busiest}, busy {figures[busiest].share_busy:.0%} of the time ({', '.join(shares[1:])})"
