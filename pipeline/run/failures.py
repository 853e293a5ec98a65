"""Failures of a run: error rows and unreadable shards, and limits on their fractions.

Counts have the keys `images`, `errors`, `shards`, `unreadable`, and each error category. Images of unreadable
shards do not count.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.commit import ManifestRow
from pipeline.config import GateConfig
from pipeline.read import Chunk, Shard

_TOTALS = {"images", "errors", "shards", "unreadable"}
#: Maximum probability that a run is stopped whose fraction of failures is not over the limit.
_FALSE_ALARM = 1e-3
#: Minimum number of images, or of unreadable shards, before a run is stopped.
_MIN_IMAGES, _MIN_UNREADABLE = 300, 100
_NO_ROW = ManifestRow("")


@dataclass
class FailureMonitor:
    """Counts the failures of a run as its results arrive, and compares them with the limits of the gate.

    A failure that the stored labels of the same version of a shard have already is known. Known failures do
    not count as new ones: shards that fail again in a retry do not stop the run.

    Attributes:
        shards: the shards to label; a chunk refers to its shard by the index in this sequence.
        entries: manifest rows before the run, by URI.
        last: counts of the last run of the dataset that ended by itself.
        stopped: counts of the runs after `last`, which were stopped or failed. This run continues them.
    """

    gate: GateConfig
    shards: Sequence[Shard]
    entries: Mapping[str, ManifestRow]
    last: Counter[str] | None = None

    def __post_init__(self) -> None:
        self.stopped, self._new, self._all = Counter[str](), Counter[str](), Counter[str]()
        self._versions = {shard.uri: shard.version for shard in self.shards}
        self._open: dict[str, Counter[str]] = {}
        self._has_new = False
        self._squares = 0  # sum of the squared numbers of images of complete shards
        self._judged: Counter[str] | None = None

    def is_new(self, shard: Shard) -> bool:
        """Returns whether no earlier run processed this version of the shard."""
        row = self.entries.get(shard.uri, _NO_ROW)
        return shard.version not in (row.version, row.failed_version)

    def add(self, chunk: Chunk) -> None:
        """Counts the images of a chunk."""
        shard = self.shards[chunk.shard]
        self._has_new |= self.is_new(shard)
        counts = self._open.setdefault(shard.uri, Counter(shards=1))
        errors = chunk.samples["error"].drop_null().to_pylist()
        counts.update(images=chunk.samples.num_rows, errors=len(errors))
        counts.update(error.partition(":")[0] for error in errors)

    def finish(self, row: ManifestRow) -> None:
        """Completes the counts of a shard with its manifest row."""
        counts = self._open.pop(row.uri)
        if row.error is not None:
            counts = Counter(shards=1, unreadable=1)
        self._all += counts
        self._new += self._without_known(row.uri, counts)
        self._squares += counts["images"] ** 2

    def _without_known(self, uri: str, counts: Counter[str]) -> Counter[str]:
        row, version = self.entries.get(uri, _NO_ROW), self._versions[uri]
        known = Counter(
            errors=row.errors or 0 if row.version == version else 0, unreadable=row.failed_version == version
        )
        return counts - known

    def _arrived(self) -> Counter[str]:
        """Returns the new failures so far, those of open shards included."""
        return sum((self._without_known(uri, counts) for uri, counts in self._open.items()), self._new)

    def certain_violations(self) -> list[str]:
        """Returns the limits that the run is certain to exceed, given that the order of shards is random.

        Images of one shard may fail for one cause. So the shards are the independent samples, by Kish's
        effective sample size if they differ in size.
        """
        counts = self._arrived()
        if counts["images"] < _MIN_IMAGES and counts["unreadable"] < _MIN_UNREADABLE:
            return []
        squares = self._squares + sum(each["images"] ** 2 for each in self._open.values())
        return self._violations(counts, counts["images"] ** 2 / max(1, squares), counts["shards"])

    def judge(self) -> list[str]:
        """Returns the limits that the run exceeds.

        A run without new shards keeps the result of the last run. If the last run exceeded a limit, and this
        run repeats shards, all their failures count.
        """
        judged = self._arrived() + self.stopped
        has_new = self._has_new or self.stopped or self._violations(judged)
        if not has_new and self.last is not None:
            judged = self._all if self._all and self._violations(self.last) else self.last
        self._judged = judged
        return self._violations(judged)

    def to_record(self) -> dict[str, int]:
        """Returns the judged counts; the new failures of complete shards if the run was not judged."""
        return dict((self._new if self._judged is None else self._judged).most_common())

    def _violations(
        self, counts: Counter[str], images: float = math.inf, shards: float = math.inf
    ) -> list[str]:
        """Returns a sentence for each limit that the counts exceed.

        If the counts are a random sample, `images` and `shards` are its numbers of independent samples.
        """
        found = []
        for failed, whole, field, samples in (
            ("errors", "images", "max_error_fraction", images),
            ("unreadable", "shards", "max_unreadable_fraction", shards),
        ):
            limit, part, count = getattr(self.gate, field), counts[failed], counts[whole]
            if limit is not None and exceeds(part, count, limit, samples):
                categories = [name for name, _ in counts.most_common() if name not in _TOTALS][:1]
                causes = [f", mostly {name} ({counts[name]:,})" for name in categories if failed == "errors"]
                fraction = f"{part:,} of {count:,} {whole} ({part / count:.1%}) failed{''.join(causes)}"
                found.append(f"{fraction}: more than gate.{field}, {limit:g}")
        return found


def exceeds(failed: int, count: int, limit: float, samples: float = math.inf) -> bool:
    """Returns whether a fraction is over the limit: by a one-sided Chernoff bound over random samples.

    The probability to see this fraction or a larger one in n samples of a population at the limit is at most
    exp(-n KL), where KL is the Kullback-Leibler divergence of the two fractions (Chernoff, 1952).
    """
    fraction = failed / count if count else 0.0
    if fraction <= limit or limit == 0:
        return fraction > limit
    divergence = fraction * math.log(fraction / limit)
    if fraction < 1:
        divergence += (1 - fraction) * math.log((1 - fraction) / (1 - limit))
    return samples * divergence > -math.log(_FALSE_ALARM)
