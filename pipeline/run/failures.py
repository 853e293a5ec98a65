"""Failures of a run: error rows and unreadable shards, and limits on their fractions.

Counts have the keys `images`, `errors`, `shards`, `unreadable`, `empty` (shards without an image), and each
error category. Copied rows are images of their shard. Images of unreadable shards do not count.
"""

import hashlib
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.commit import ManifestRow
from pipeline.config import GateConfig
from pipeline.read import Shard
from pipeline.run.copied_rows import CopiedRows
from pipeline.run.planning import NO_ROW
from pipeline.statistics import ErrorCauses
from pipeline.text import pluralize

_TOTALS = {"images", "errors", "shards", "unreadable", "empty"}
#: Maximum probability of one check to stop a run whose fraction of failures is not over the limit.
_FALSE_ALARM = 1e-3
#: Minimum number of images, or of unreadable shards, before a run is stopped.
_MIN_IMAGES, _MIN_UNREADABLE = 300, 100


@dataclass
class FailureMonitor:
    """Counts the failures of a run by shard, and compares them with the limits of the gate.

    A failure that the stored labels of the same version of a shard have already is known. Known failures
    count only if the last run exceeded a limit: shards that fail again in a retry do not break a limit.
    The limits apply to the counts of this run and of the stopped runs that this run continues, or to those of
    the last run if there are none.

    Attributes:
        shards: the shards to label.
        entries: manifest rows before the run, by URI.
        copied: the rows that a shard copies from stored labels, by URI.
        last: counts of the last run of the dataset that ended by itself.
        stopped: counts of the runs after `last` that were stopped or failed, and that this run continues.
        causes: the errors of the complete shards.
        order: indexes of the shards in a random order, the same in every run: sorted by a hash of the URI.
    """

    gate: GateConfig
    shards: Sequence[Shard]
    entries: Mapping[str, ManifestRow]
    copied: Mapping[str, CopiedRows] = field(default_factory=dict)
    last: Counter[str] = field(default_factory=Counter)
    stopped: Counter[str] = field(default_factory=Counter)
    causes: ErrorCauses = field(default_factory=ErrorCauses)

    def __post_init__(self) -> None:
        hashes = [hashlib.blake2b(shard.uri.encode()).digest() for shard in self.shards]
        self.order = sorted(range(len(hashes)), key=hashes.__getitem__)
        self._by_uri = {shard.uri: shard for shard in self.shards}
        self._counts = Counter[str]()
        # The sample: the new failures of the first shards of the order, all of which are complete.
        self._sample, self._following = Counter[str](), deque(self.shards[i] for i in self.order)
        self._complete: dict[str, Counter[str]] = {}  # shards that are not in the sample yet
        self._max_images, self._max_bytes = 0, 1  # of a readable shard of the sample
        self._max_planned_bytes = max((shard.size for shard in self.shards), default=0)

    def is_new(self, shard: Shard) -> bool:
        """Returns whether no earlier run processed this version of the shard."""
        row = self.entries.get(shard.uri, NO_ROW)
        return shard.version not in (row.version, row.failed_version)

    def finish(self, row: ManifestRow) -> None:
        """Counts a complete shard."""
        shard, before = self._by_uri[row.uri], self.entries.get(row.uri, NO_ROW)
        counts = Counter(shards=1, images=row.rows or 0, errors=row.errors or 0, empty=row.rows == 0)
        if row.error is not None:
            counts = Counter(shards=1, unreadable=1)
        copied = self.copied.get(row.uri, CopiedRows(0))
        known = Counter(
            errors=before.errors or 0 if before.version == shard.version else copied.errors,
            unreadable=before.failed_version == shard.version,
            empty=before.version == shard.version,
        )
        self._counts += counts if self.exceeded_limits(self.last) else counts - known
        self._complete[row.uri] = counts - known
        while self._following and (next_counts := self._complete.pop(self._following[0].uri, None)):
            first = self._following.popleft()
            self._sample += next_counts
            if next_counts["images"]:
                self._max_images = max(self._max_images, next_counts["images"])
                self._max_bytes = max(self._max_bytes, first.size)

    def certain_violations(self) -> list[str]:
        """Returns the limits that the run is certain to exceed, given that the order of shards is random.

        Images of one shard may fail for one cause, so the shards are the independent samples. Shards that
        are not in the sample may be larger: their number of images is estimated from their size.
        """
        sample = self._sample
        if sample["images"] < _MIN_IMAGES and sample["unreadable"] < _MIN_UNREADABLE:
            return []
        larger = max(1.0, self._max_planned_bytes / self._max_bytes)
        largest = {"images": self._max_images * larger, "shards": 1}
        return self.exceeded_limits(sample + self.causes.categories(), largest)

    def own(self) -> Counter[str]:
        """Returns the counts of this run alone."""
        return self._counts + self.causes.categories()

    def judged(self) -> Counter[str]:
        """Returns the counts that the limits apply to."""
        return self.own() + self.stopped or self.last

    def exceeded_limits(self, counts: Counter[str], largest: Mapping[str, float] | None = None) -> list[str]:
        """Returns a sentence for each limit that the counts exceed.

        For a random sample, `largest` is the maximum number of `images`, and of `shards`, in one shard.
        """
        found = []
        for failed, whole, name, verb in (
            ("errors", "images", "max_error_fraction", "failed"),
            ("unreadable", "shards", "max_unreadable_fraction", "cannot be read"),
        ):
            limit, part, count = getattr(self.gate, name), counts[failed], counts[whole]
            if limit is None or not count or part / count <= limit:
                continue
            if largest is not None:  # the failures over the limit, as a fraction of the largest shard
                mean_excess = (part - limit * count) / (counts["shards"] * largest[whole])
                if not is_certain(limit + mean_excess, limit, counts["shards"]):
                    continue
            categories = [each for each, _ in counts.most_common() if each not in _TOTALS]
            cause = f", mostly {categories[0]}" if categories and failed == "errors" else ""
            fraction = f"{part:,} of {count:,} {whole} ({part / count:.1%}) {verb}{cause}"
            found.append(f"{fraction}; the limit gate.{name} is {limit:g}")
        is_limited = largest is None and self.gate.max_unreadable_fraction is not None
        if is_limited and not found and counts["empty"] and not counts["images"]:
            shards = f"{counts['empty']:,} of {pluralize(counts['shards'], 'shard')}"
            found.append(
                f"no image found: {shards} are empty; gate.max_unreadable_fraction: null allows this"
            )
        return found


def is_certain(mean: float, limit: float, samples: int) -> bool:
    """Returns whether a population mean is over the limit, by a one-sided Chernoff bound over random samples.

    The probability of this mean or a larger one of n samples in [0, 1], drawn from a population at the limit,
    is at most exp(-n KL), where KL is the Kullback-Leibler divergence of the two (Hoeffding, 1963).
    """
    if mean <= limit or limit == 0:
        return mean > limit
    divergence = mean * math.log(mean / limit)
    if mean < 1:
        divergence += (1 - mean) * math.log((1 - mean) / (1 - limit))
    return samples * divergence > -math.log(_FALSE_ALARM)
