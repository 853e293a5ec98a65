"""A run's metrics for Prometheus, which Ray's agents export on every node.

All are counted in the driver, of what has come out: in workers, what is tried twice would count twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ray.util.metrics import Counter, Histogram

from pipeline.commit import Totals
from pipeline.read import Chunk
from pipeline.statistics import CLASSIFY, STAGES, StageMetrics

#: Prometheus sees these names with `ray_` before, and the counters' with `_total` behind.
PREFIX = "cvt_label_"


#: Bounds of the buckets of a batch's seconds: from a small model on a GPU to a large one on a CPU.
BATCH_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]


class RunMetrics:
    """What a run counts; Ray must be connected.

    Args:
        dataset: URI of the input.
        model: name and fingerprint of the partition.
        planned: shards that are to be labeled.
        batch_size: images in a batch, at most.
    """

    def __init__(self, dataset: str, model: str, planned: int, batch_size: int) -> None:
        self._tags = {"dataset": dataset, "model": model}
        self._batch_size = batch_size
        self._images = self._counter("images", "Images that are committed, by outcome.", "outcome")
        self._shards = self._counter("shards", "Shards that are done, by outcome.", "outcome")
        self._bytes = self._counter("bytes", "Bytes that a stage passed on.", "stage")
        self._stage_images = self._counter("stage_images", "Images that came to a stage.", "stage")
        self._seconds = self._counter(
            "stage_seconds",
            "Seconds in which a stage's workers worked, or waited for work.",
            "stage",
            "state",
        )
        self._retries = self._counter(
            "retries", "Failures of storage that were tried again, by kind.", "kind"
        )
        # Not a gauge of those that are left: Ray forgets gauges with their process.
        self._counter("shards_planned", "Shards that are to be labelled.").inc(planned)
        self._batches = Histogram(
            f"{PREFIX}batch_seconds",
            "Seconds that classifying a batch takes, as an average over its chunk.",
            boundaries=BATCH_SECONDS,
            tag_keys=tuple(self._tags),
        ).set_default_tags(self._tags)
        self._counted: dict[tuple[str, ...], float] = {}

    def update(self, totals: Totals, retries: Mapping[str, int], chunk: Chunk | None) -> None:
        """Raises the counters to the current state of the run.

        Args:
            totals: what is committed.
            retries: storage operations that were tried again, by kind of failure.
            chunk: has arrived since the last call.
        """
        if chunk is not None:
            classifying = chunk.metrics[CLASSIFY]
            batches = math.ceil(classifying.images / self._batch_size)
            for _ in range(batches):
                self._batches.observe(classifying.busy_s / batches)
        unreadable = len(totals.unreadable)
        self._grow(self._images, totals.images - totals.errors, outcome="labelled")
        self._grow(self._images, totals.errors, outcome="error")
        self._grow(self._shards, totals.shards - unreadable, outcome="committed")
        self._grow(self._shards, unreadable, outcome="unreadable")
        for stage in STAGES:
            metrics = totals.metrics.get(stage, StageMetrics())
            self._grow(self._bytes, metrics.bytes, stage=stage)
            self._grow(self._stage_images, metrics.images, stage=stage)
            self._grow(self._seconds, metrics.busy_s, stage=stage, state="busy")
            self._grow(self._seconds, metrics.wait_s, stage=stage, state="wait")
        for kind, count in retries.items():
            self._grow(self._retries, count, kind=kind)

    def _grow(self, counter: Counter, value: float, **tags: str) -> None:
        """Raises a counter to a value that it has for these tags."""
        at = (counter.info["name"], *tags.values())
        step = value - self._counted.get(at, 0.0)
        if step > 0:
            counter.inc(step, tags)
            self._counted[at] = value

    def _counter(self, name: str, description: str, *tags: str) -> Counter:
        counter = Counter(f"{PREFIX}{name}", description, tag_keys=(*self._tags, *tags))
        counter.set_default_tags(self._tags)
        return counter
