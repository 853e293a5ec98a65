"""The committer: results of chunks in, one prediction file a shard out, in one atomic write.

It holds the result rows of open shards, never pixels. It runs in the driver and knows nothing of Ray.

The order of a commit:
 1. chunks of a shard are kept, by their first index, until they cover the shard, in any order of arrival;
 2. the file is assembled, in the shard's order, and encoded in memory;
 3. one atomic, conditional write makes it visible (`prediction_files`);
 4. only then does the shard get a manifest row.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from pipeline.commit.manifest import ManifestRow
from pipeline.commit.prediction_files import (
    CommittedShard,
    IncompleteShardError,
    OpenShard,
    PredictionWriter,
    count_errors,
)
from pipeline.read import Chunk, Shard
from pipeline.statistics import COMMIT, ErrorCauses, StageMetrics, add_metrics

#: Files that are written at once: each is one shard's result rows, so few are enough to hide a PUT's latency.
WRITERS = 4


@dataclass(frozen=True, slots=True)
class Progress:
    """What has arrived: images, error rows among them, shards that are done, and the share of all bytes."""

    images: int
    errors: int
    shards: int
    share: float


@dataclass
class Totals:
    """What is committed.

    Attributes:
        shards: number of shards that are done, unreadable ones included.
        images: samples, error rows included.
        retries: storage operations that workers tried again, by kind of failure.
        metrics: by stage; those of chunks of open shards are included.
    """

    shards: int = 0
    images: int = 0
    errors: int = 0
    duplicate_keys: int = 0
    unreadable: list[ManifestRow] = field(default_factory=list)
    causes: ErrorCauses = field(default_factory=ErrorCauses)
    retries: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, StageMetrics] = field(default_factory=dict)


class Committer:
    """Assembles shards and writes their prediction files; use it as a context manager."""

    def __init__(
        self, writer: PredictionWriter, plan: Sequence[Shard], on_commit: Callable[[ManifestRow], None]
    ) -> None:
        """Chunks name shards by their place in the plan.

        `on_commit` is called in this thread, with the manifest row of each shard that is done.
        """
        self.totals = Totals()
        self._writer, self._plan, self._on_commit = writer, plan, on_commit
        self._accepts_new = True
        self._open: dict[int, OpenShard] = {}
        self._missing = dict.fromkeys(range(len(plan)))  # in the plan's order
        self._images = self._errors = 0
        self._bytes, self._planned_bytes = 0, sum(shard.size for shard in plan)
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="commit")
        self._writes: deque[Future[CommittedShard]] = deque()

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._writers.shutdown(wait=True, cancel_futures=kind is not None)
        for write in self._writes:  # left where an error ended the run: what is written is done
            if not write.cancelled() and write.exception() is None:
                self._settle(write)

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk's results, and commits its shard if they complete it; raises as `settle`."""
        if chunk.shard not in self._missing or not (self._accepts_new or chunk.shard in self._open):
            return
        arrived = self._open.setdefault(chunk.shard, OpenShard())
        if not arrived.add(chunk):
            return
        self.totals.retries.update(chunk.retries)
        add_metrics(self.totals.metrics, chunk.metrics)
        self._images += chunk.samples.num_rows
        self._errors += count_errors(chunk)
        # Of open shards, encoded images only; a tar has more bytes: as many again where images are small.
        self._bytes += chunk.encoded_bytes
        if arrived.complete:
            self._close(chunk.shard, arrived)
        while self._writes and (len(self._writes) > 2 * WRITERS or self._writes[0].done()):
            self._settle(self._writes.popleft())

    def _close(self, number: int, arrived: OpenShard) -> None:
        shard = self._plan[number]
        self._bytes += shard.size - arrived.encoded_bytes
        if arrived.error is not None:  # then its samples don't come out after all
            self._images -= arrived.samples
            self._errors -= arrived.errors
        del self._open[number], self._missing[number]
        self._writes.append(self._writers.submit(self._writer.commit, shard, arrived))

    def wind_down(self) -> None:
        """From now on takes results of open shards only."""
        self._accepts_new = False

    @property
    def open_shards(self) -> int:
        """Number of shards of which some results have arrived, but not all."""
        return len(self._open)

    def settle(self) -> None:
        """Waits for the files of complete shards; raises `StorageError` if one couldn't be written."""
        while self._writes:
            self._settle(self._writes.popleft())

    def finish(self) -> None:
        """Waits for the last files, when the stream of results has ended; raises as `settle`.

        Also raises `IncompleteShardError` if results are missing, so that a shard of the plan isn't covered.
        """
        self.settle()
        for number in self._missing:
            uri, arrived = self._plan[number].uri, self._open.get(number, OpenShard())
            total = arrived.total or "an unknown number of"
            raise IncompleteShardError(f"{uri}: {arrived.samples} of {total} samples came out")

    def missing(self, most: int) -> list[str]:
        """The first shards of the plan that are not complete, by URI."""
        return [self._plan[number].uri for number in islice(self._missing, most)]

    def progress(self) -> Progress:
        """What has arrived."""
        share = self._bytes / self._planned_bytes if self._planned_bytes else 1.0
        return Progress(self._images, self._errors, self.totals.shards, min(1.0, share))

    def _settle(self, write: Future[CommittedShard]) -> None:
        (row, metrics, causes), totals = write.result(), self.totals
        add_metrics(totals.metrics, {COMMIT: metrics})
        totals.causes.merge(causes)
        totals.shards += 1
        totals.images += row.rows or 0
        totals.errors += row.errors or 0
        totals.duplicate_keys += row.duplicate_keys or 0
        if row.error is not None:
            totals.unreadable.append(row)
        self._on_commit(row)
