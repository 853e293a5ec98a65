"""A run's metrics for Prometheus, which Ray's agents export on every node.

All are counted in the driver, of what has come out: in workers, what is tried twice would count twice.
"""

import math
from collections.abc import Mapping

from ray.util.metrics import Counter, Histogram

from pipeline.commit import Totals
from pipeline.read import Chunk
from pipeline.statistics import CLASSIFY, STAGES, StageMetrics

#: Prometheus sees these names with `ray_` before, and the counters' with `_total` behind.
_PREFIX = "cvt_label_"

#: Descriptions of the counters, and their tags beside dataset and model.
_COUNTERS = {
    "images": ("Images that are committed, by outcome.", ("outcome",)),
    "shards": ("Shards that are done, by outcome.", ("outcome",)),
    # Not a gauge of those that are left: Ray forgets gauges with their process.
    "shards_planned": ("Shards that are to be labelled.", ()),
    "stage_bytes": ("Bytes that a stage passed on.", ("stage",)),
    "stage_images": ("Images that came to a stage.", ("stage",)),
    "stage_seconds": ("Seconds in which a stage's workers worked, or waited for work.", ("stage", "state")),
    "storage_retries": ("Failures of storage that were tried again, by kind.", ("kind",)),
}

#: Bounds of the buckets of a batch's seconds: from a small model on a GPU to a large one on a CPU.
_BATCH_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]


class RunMetrics:
    """What a run counts; Ray must be connected."""

    def __init__(self, dataset: str, model: str, planned: int, batch_size: int) -> None:
        tags = {"dataset": dataset, "model": model}
        self._batch_size = batch_size
        self._batches = Histogram(
            f"{_PREFIX}batch_seconds",
            "Seconds that classifying a batch takes, as an average over its chunk.",
            boundaries=_BATCH_SECONDS,
            tag_keys=tuple(tags),
        ).set_default_tags(tags)
        self._counters: dict[str, Counter] = {}
        for name, (description, more) in _COUNTERS.items():
            self._counters[name] = Counter(f"{_PREFIX}{name}", description, tag_keys=(*tags, *more))
            self._counters[name].set_default_tags(tags)
        self._counted: dict[tuple[str, ...], float] = {}
        self._grow("shards_planned", planned)

    def update(self, totals: Totals, retries: Mapping[str, int], chunk: Chunk | None) -> None:
        """Raises the counters to the current state of the run; `chunk` has arrived since the last call."""
        if chunk is not None:
            classifying = chunk.metrics[CLASSIFY]
            batches = math.ceil(classifying.images / self._batch_size)
            for _ in range(batches):
                self._batches.observe(classifying.busy_s / batches)
        unreadable = len(totals.unreadable)
        self._grow("images", totals.images - totals.errors, outcome="labeled")
        self._grow("images", totals.errors, outcome="error")
        self._grow("shards", totals.shards - unreadable, outcome="committed")
        self._grow("shards", unreadable, outcome="unreadable")
        for stage in STAGES:
            metrics = totals.metrics.get(stage, StageMetrics())
            self._grow("stage_bytes", metrics.bytes, stage=stage)
            self._grow("stage_images", metrics.images, stage=stage)
            self._grow("stage_seconds", metrics.busy_s, stage=stage, state="busy")
            self._grow("stage_seconds", metrics.wait_s, stage=stage, state="wait")
        for kind, count in retries.items():
            self._grow("storage_retries", count, kind=kind)

    def _grow(self, name: str, value: float, **tags: str) -> None:
        """Raises a counter to a value that it has for these tags."""
        at = (name, *tags.values())
        step = value - self._counted.get(at, 0.0)
        if step > 0:
            self._counters[name].inc(step, tags)
            self._counted[at] = value
