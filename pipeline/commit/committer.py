"""The committer: turns labeled chunks into one prediction file per shard, each in one atomic write.

The committer runs in the driver, without Ray. A shard gets its manifest row only after its file was written.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from pipeline.commit.manifest import ManifestRow
from pipeline.commit.prediction_files import CommittedShard, IncompleteShardError, OpenShard, PredictionWriter
from pipeline.read import Chunk, Shard
from pipeline.statistics import COMMIT, ErrorCauses, StageMetrics

#: A file holds the result rows of one shard, so a few concurrent writes hide the latency of a PUT.
MAX_CONCURRENT_WRITES = 4


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a run.

    Attributes:
        images: images whose results have arrived, error rows included.
        fraction: processed fraction of the bytes of all planned shards, from 0 to 1.
    """

    images: int
    errors: int
    shards: int
    fraction: float


@dataclass
class Totals:
    """Counts and metrics of the committed shards.

    Unreadable shards count as shards, and error rows as images.

    Attributes:
        merged_images: images that are not labeled because another image of their sample is.
        damaged: shards that are labeled as far as they are readable.
        retries: storage operations that workers retried, by kind of failure.
        unmatched: labels of the dataset that are not classes of the model.
        metrics: metrics by stage, chunks of open shards included.
    """

    shards: int = 0
    images: int = 0
    errors: int = 0
    duplicate_keys: int = 0
    merged_images: int = 0
    unreadable: list[ManifestRow] = field(default_factory=list)
    damaged: list[ManifestRow] = field(default_factory=list)
    causes: ErrorCauses = field(default_factory=ErrorCauses)
    unmatched: ErrorCauses = field(default_factory=ErrorCauses)
    retries: Counter[str] = field(default_factory=Counter)
    metrics: defaultdict[str, StageMetrics] = field(default_factory=lambda: defaultdict(StageMetrics))


class Committer:
    """Assembles shards and writes their prediction files; use it as a context manager.

    Without `accepts_new_shards`, results of shards that are not open yet are ignored.
    """

    def __init__(
        self, writer: PredictionWriter, plan: Sequence[Shard], on_commit: Callable[[ManifestRow], None]
    ) -> None:
        """Creates a committer; a chunk refers to its shard by the index in `plan`.

        `on_commit` is called in this thread with the manifest row of each shard that is done.
        """
        self.totals, self.accepts_new_shards = Totals(), True
        self._writer, self._plan, self._on_commit = writer, plan, on_commit
        self._open: dict[int, OpenShard] = {}
        self._unfinished = dict.fromkeys(range(len(plan)))  # in the order of the plan
        self._images = self._errors = 0
        self._bytes, self._planned_bytes = 0, sum(shard.size for shard in plan)
        self._writers = ThreadPoolExecutor(MAX_CONCURRENT_WRITES, thread_name_prefix="commit")
        self._writes: deque[Future[CommittedShard]] = deque()

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._writers.shutdown(wait=True, cancel_futures=kind is not None)
        for write in self._writes:  # left if an error ended the run: completed writes count
            if not write.cancelled() and write.exception() is None:
                self._finish_write(write)

    def add(self, chunk: Chunk) -> None:
        """Adds a chunk, and commits the shard if it is complete; raises `StorageError` if a write failed."""
        if chunk.shard not in self._unfinished or not (self.accepts_new_shards or chunk.shard in self._open):
            return
        arrived = self._open.setdefault(chunk.shard, OpenShard())
        if not arrived.add(chunk):
            return
        self.totals.retries.update(chunk.retries)
        self.totals.merged_images += chunk.merged
        for stage, metrics in chunk.metrics.items():
            self.totals.metrics[stage] += metrics
        if arrived.complete:
            shard = self._plan[chunk.shard]
            self._bytes += shard.size
            if chunk.error is None:  # an unreadable shard has no result rows
                self._images += arrived.samples
                self._errors += arrived.errors
            del self._open[chunk.shard], self._unfinished[chunk.shard]
            self._writes.append(self._writers.submit(self._writer.commit, shard, arrived))
        while self._writes and (len(self._writes) > 2 * MAX_CONCURRENT_WRITES or self._writes[0].done()):
            self._finish_write(self._writes.popleft())

    @property
    def open_shards(self) -> int:
        """Number of shards with some but not all results."""
        return len(self._open)

    @property
    def is_complete(self) -> bool:
        """Whether all chunks of all shards have arrived."""
        return not self._unfinished

    def wait_for_writes(self) -> None:
        """Waits for the files of complete shards; raises `StorageError` if a file can't be written."""
        while self._writes:
            self._finish_write(self._writes.popleft())

    def finish(self) -> None:
        """Waits for the last files; also raises `IncompleteShardError` if a shard lacks results."""
        self.wait_for_writes()
        for number in self._unfinished:
            uri, arrived = self._plan[number].uri, self._open.get(number, OpenShard())
            total = "an unknown number of" if arrived.last is None else arrived.last.total
            raise IncompleteShardError(f"{uri}: {arrived.samples} of {total} samples have results")

    def unfinished(self) -> list[str]:
        """Returns the URIs of the shards of the plan that are not complete."""
        return [self._plan[number].uri for number in self._unfinished]

    def progress(self) -> Progress:
        """Returns the current progress."""
        arrived = self._open.values()
        images = self._images + sum(shard.samples for shard in arrived)
        errors = self._errors + sum(shard.errors for shard in arrived)
        # For open shards, only encoded images count. A tar has more bytes, twice as many if images are small.
        size = self._bytes + sum(shard.encoded_bytes for shard in arrived)
        fraction = size / self._planned_bytes if self._planned_bytes else 1.0
        return Progress(images, errors, self.totals.shards, min(1.0, fraction))

    def _finish_write(self, write: Future[CommittedShard]) -> None:
        (row, metrics, causes, unmatched), totals = write.result(), self.totals
        totals.metrics[COMMIT] += metrics
        totals.causes.merge(causes)
        totals.unmatched.merge(unmatched)
        totals.shards += 1
        totals.images += row.rows or 0
        totals.errors += row.errors or 0
        totals.duplicate_keys += row.duplicate_keys or 0
        if row.error is not None:
            totals.unreadable.append(row)
        elif row.damage is not None:
            totals.damaged.append(row)
        self._on_commit(row)
