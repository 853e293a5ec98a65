"""Metrics of a run for Prometheus, counted by the driver: workers would count retried work twice."""

import math
from collections.abc import Mapping

from ray.util.metrics import Counter, Histogram

from pipeline.commit import Totals
from pipeline.read import Chunk
from pipeline.statistics import CLASSIFY, STAGES

#: Ray exports the names with the prefix `ray_`, and counters with the suffix `_total`.
_PREFIX = "cvt_label_"

#: Descriptions of the counters, and their tags in addition to dataset and model.
_COUNTERS = {
    "images": ("Committed images, by outcome.", ("outcome",)),
    "shards": ("Finished shards, by outcome.", ("outcome",)),
    # A counter, because Ray drops a gauge of remaining shards when its process ends.
    "shards_planned": ("Shards that the run will label.", ()),
    "stage_bytes": ("Bytes of the output of a stage.", ("stage",)),
    "stage_images": ("Images that a stage processed.", ("stage",)),
    "stage_seconds": ("Seconds that the workers of a stage were busy, or waited.", ("stage", "state")),
    "storage_retries": ("Retried storage operations, by kind of failure.", ("kind",)),
}

#: Upper bounds of the buckets in seconds, from a small model on a GPU to a large model on a CPU.
_BATCH_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]


class RunMetrics:
    """The counters of a run; needs a connection to Ray."""

    def __init__(self, dataset: str, model: str, planned: int, batch_size: int) -> None:
        tags = {"dataset": dataset, "model": model}
        self._batch_size = batch_size
        self._batches = Histogram(
            f"{_PREFIX}batch_seconds",
            "Seconds to classify a batch, averaged over a chunk.",
            boundaries=_BATCH_SECONDS,
            tag_keys=tuple(tags),
        ).set_default_tags(tags)
        self._counters: dict[str, Counter] = {}
        for name, (description, extra_tags) in _COUNTERS.items():
            self._counters[name] = Counter(f"{_PREFIX}{name}", description, tag_keys=(*tags, *extra_tags))
            self._counters[name].set_default_tags(tags)
        self._counted: dict[tuple[str, ...], float] = {}
        self._raise_to("shards_planned", planned)

    def update(self, totals: Totals, retries: Mapping[str, int], chunk: Chunk | None) -> None:
        """Raises the counters to the current totals.

        Args:
            totals: what the run has committed so far.
            retries: retried storage operations of driver and workers, by kind of failure.
            chunk: the chunk that has arrived since the last call, if any.
        """
        if chunk is not None:
            classifying = chunk.metrics[CLASSIFY]
            batches = math.ceil(classifying.images / self._batch_size)
            for _ in range(batches):
                self._batches.observe(classifying.busy_s / batches)
        unreadable = len(totals.unreadable)
        self._raise_to("images", totals.images - totals.errors, outcome="labeled")
        self._raise_to("images", totals.errors, outcome="error")
        self._raise_to("shards", totals.shards - unreadable, outcome="committed")
        self._raise_to("shards", unreadable, outcome="unreadable")
        for stage in STAGES:
            metrics = totals.metrics[stage]
            self._raise_to("stage_bytes", metrics.bytes, stage=stage)
            self._raise_to("stage_images", metrics.images, stage=stage)
            self._raise_to("stage_seconds", metrics.busy_s, stage=stage, state="busy")
            self._raise_to("stage_seconds", metrics.wait_s, stage=stage, state="wait")
        for kind, count in retries.items():
            self._raise_to("storage_retries", count, kind=kind)

    def _raise_to(self, name: str, value: float, **tags: str) -> None:
        """Raises the counter with these tags to a value."""
        key = (name, *tags.values())
        increment = value - self._counted.get(key, 0.0)
        if increment > 0:
            self._counters[name].inc(increment, tags)
            self._counted[key] = value
