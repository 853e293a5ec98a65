"""The committer: results of chunks in, one prediction file a shard out, in one atomic write.

What it holds is the open shards' result rows, never pixels. It runs in the driver and knows nothing of Ray.

The order of a commit:
 1. chunks of a shard are kept, by their first index, until they cover the shard, however they arrive;
 2. the file is assembled, in the shard's order, and encoded in memory;
 3. one atomic write makes it visible: before it there is no trace of the shard, after it the whole of it.
    It is conditional: it replaces what the plan has seen there, or else finds out whose is right;
 4. only then does the shard get a manifest row.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit.assembly import IncompleteShardError, OpenShard, count_errors
from pipeline.commit.manifest import ManifestRow, labelled_row
from pipeline.predictions import (
    Footer,
    PredictionOptions,
    encode,
    prediction_path,
    prediction_schema,
    read_footer,
)
from pipeline.read import Chunk, Shard
from pipeline.statistics import COMMIT, Causes, ClassStatistics, Meter, StageMetrics, add_metrics
from pipeline.storage import ABSENT, ObjectChanged, ObjectNotFound, Storage

logger = logging.getLogger("cvt_label")


#: Files in the making: each is one shard's result rows, so few are enough to hide a PUT's latency.
WRITERS = 4


# Of a shard; all are in its prediction file.
_LOGGED_ERRORS = 3


@dataclass(frozen=True)
class Target:
    """Where prediction files go, and what they hold.

    Attributes:
        storage: where they go.
        partition: URI of the model's partition.
        fingerprint: hash over everything that decides a label.
        options: what the prediction columns are.
    """

    storage: Storage
    partition: str
    fingerprint: str
    options: PredictionOptions


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the committer is.

    Attributes:
        images: that have arrived, error rows included.
        errors: error rows among them.
        shards: that are done.
        share: of the plan's bytes that have arrived, from 0 to 1.
    """

    images: int
    errors: int
    shards: int
    share: float


@dataclass
class Totals:
    """What is committed.

    Attributes:
        shards: shards that are done, those that couldn't be read too.
        images: samples, error rows included.
        errors: samples that are error rows.
        duplicate_keys: samples whose key an earlier sample of their shard has.
        unreadable: the shards that couldn't be read.
        causes: of the error rows.
        retries: storage operations that workers tried again, by kind of failure.
        metrics: of all stages, by stage, those of chunks of open shards included.
    """

    shards: int = 0
    images: int = 0
    errors: int = 0
    duplicate_keys: int = 0
    unreadable: list[ManifestRow] = field(default_factory=list)
    causes: Causes = field(default_factory=Causes)
    retries: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, StageMetrics] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Done:
    """A shard that is done: its manifest row, the metrics of the commit, and its error rows."""

    row: ManifestRow
    metrics: StageMetrics
    causes: Causes


class Committer:
    """Assembles shards and writes their prediction files; use it as a context manager.

    Attributes:
        totals: what is committed.
    """

    def __init__(
        self,
        target: Target,
        plan: Sequence[Shard],
        run: str,
        *,
        expected: Mapping[str, str],
        is_current: Callable[[Shard], bool],
        on_commit: Callable[[ManifestRow], None],
        before_group: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        target: where the files go.
        plan: the shards, by the number that their chunks carry.
        run: id of the run.
        expected: by URI of a shard, the version of the prediction file that it has already.
        is_current: says whether a shard is still what the input has; asked where another run has
            meanwhile labelled another version of it.
        on_commit: called with the manifest row of each shard that is done, in this thread.
        before_group: called before the labels of a group of loose images are written, in any thread;
            raises if they mustn't be. Another run may have grouped the images otherwise, so that
            an overtaken run's labels would be there twice; tars and Parquet files don't share samples.
        """
        self.totals = Totals()
        self._expected = expected
        self._is_current = is_current
        self._on_commit = on_commit
        self._before_group = before_group
        self._accepts_new = True
        self._target = target
        self._storage = target.storage
        self._plan = plan
        self._run = run
        self._schema = prediction_schema(target.options.embedding, target.options.embedding_width)
        self._open: dict[int, OpenShard] = {}
        self._closed: set[int] = set()
        self._images = self._errors = 0
        self._bytes, self._planned_bytes = 0, sum(shard.size for shard in plan)
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="commit")
        self._writes: deque[Future[_Done]] = deque()

    def __enter__(self) -> Committer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writers.shutdown(wait=True, cancel_futures=error is not None)
        for write in self._writes:  # left where an error ended the run: what is written is done
            if not write.cancelled() and write.exception() is None:
                self._settle(write)

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk's results, and commits its shard if they complete it.

        Raises:
            StorageError: an earlier shard's file couldn't be written.
        """
        if chunk.shard in self._closed or not (self._accepts_new or chunk.shard in self._open):
            return
        shard = self._open.setdefault(chunk.shard, OpenShard())
        if not shard.add(chunk):
            return
        self.totals.retries.update(chunk.retries)
        add_metrics(self.totals.metrics, chunk.metrics)
        self._images += chunk.samples.num_rows
        self._errors += count_errors(chunk)
        # Encoded images, of what is open; a tar has more bytes, which may be as many again if they are small.
        self._bytes += chunk.encoded_bytes
        shard.encoded_bytes += chunk.encoded_bytes
        if shard.complete:
            self._bytes += self._plan[chunk.shard].size - shard.encoded_bytes
            if shard.error is not None:  # then its samples don't come out after all
                self._images -= shard.samples
                self._errors -= sum(map(count_errors, shard.chunks.values()))
            del self._open[chunk.shard]
            self._closed.add(chunk.shard)
            self._writes.append(self._writers.submit(self._measured_commit, self._plan[chunk.shard], shard))
        while self._writes and (len(self._writes) > 2 * WRITERS or self._writes[0].done()):
            self._settle(self._writes.popleft())

    def wind_down(self) -> None:
        """From now on takes results only of shards that it has some of already."""
        self._accepts_new = False

    @property
    def open_shards(self) -> int:
        """Shards of which some results have come, but not all."""
        return len(self._open)

    def settle(self) -> None:
        """Waits for the files of complete shards.

        Raises:
            StorageError: a file couldn't be written.
        """
        while self._writes:
            self._settle(self._writes.popleft())

    def finish(self) -> None:
        """Waits for the last files, when the stream of results has ended.

        Raises:
            StorageError: a file couldn't be written.
            IncompleteShardError: results are missing, so that a shard of the plan isn't covered.
        """
        self.settle()
        for number in self._missing():
            uri, arrived = self._plan[number].uri, self._open.get(number, OpenShard())
            total = arrived.total or "an unknown number of"
            raise IncompleteShardError(f"{uri}: {arrived.samples} of {total} samples came out")

    def missing(self, most: int) -> list[str]:
        """The first shards of the plan that are not complete, by URI."""
        return [self._plan[number].uri for number in islice(self._missing(), most)]

    def _missing(self) -> Iterator[int]:
        return (number for number in range(len(self._plan)) if number not in self._closed)

    def progress(self) -> Progress:
        """How far it is."""
        share = self._bytes / self._planned_bytes if self._planned_bytes else 1.0
        return Progress(self._images, self._errors, self.totals.shards, min(1.0, share))

    def _settle(self, write: Future[_Done]) -> None:
        done = write.result()
        row = done.row
        add_metrics(self.totals.metrics, {COMMIT: done.metrics})
        self.totals.causes.merge(done.causes)
        self.totals.shards += 1
        self.totals.images += row.rows or 0
        self.totals.errors += row.errors or 0
        self.totals.duplicate_keys += row.duplicate_keys or 0
        if row.error is not None:
            self.totals.unreadable.append(row)
        self._on_commit(row)

    def _measured_commit(self, shard: Shard, arrived: OpenShard) -> _Done:
        meter, causes = Meter(), Causes()
        with meter:
            row, size = self._commit(shard, arrived)
            if row.output is not None:
                for _, chunk in sorted(arrived.chunks.items()):
                    causes.add(shard.uri, chunk.samples)
        return _Done(row, meter.take(row.rows or 0, size), causes)

    def _commit(self, shard: Shard, arrived: OpenShard) -> tuple[ManifestRow, int]:
        """Writes the shard's prediction file; returns its manifest row, and the bytes written."""
        if arrived.error is not None:
            return self._failed(shard, arrived.error, None if arrived.transient else shard.version), 0
        predictions = self._assemble(shard, arrived)
        footer = Footer(
            shard=shard.uri,
            version=shard.version,
            format=shard.format,
            size=shard.size,
            fingerprint=self._target.fingerprint,
            rows=predictions.num_rows,
            errors=predictions.num_rows - predictions["error"].null_count,
            duplicate_keys=predictions.num_rows - pc.count_distinct(predictions["key"]).as_py(),
            partial=ClassStatistics.of(predictions, len(self._target.options.labels)).to_partial(),
        )
        self._log_errors(shard, predictions)
        output = f"predictions/{prediction_path(shard.uri)}"
        content = encode(predictions, footer)
        if shard.members:
            self._before_group()
        written = self._write(shard, output, content, footer)
        if written is None:
            return self._failed(shard, f"{shard.uri}: has changed since it was listed", shard.version), 0
        row = labelled_row(written[0], output, written[1])
        return replace(row, run=self._run, committed_at=datetime.now(UTC)), len(content)

    def _log_errors(self, shard: Shard, predictions: pa.Table) -> None:
        """Tells of a shard's first error rows; names come from data, so they are quoted."""
        bad = predictions.filter(pc.is_valid(predictions["error"]))
        for row in bad.slice(0, _LOGGED_ERRORS).select(["index", "key", "error"]).to_pylist():
            where = self._run, shard.uri, row["index"], row["key"]
            logger.warning("run %s: shard %r, sample %d, key %r: %s", *where, row["error"])
        if bad.num_rows > _LOGGED_ERRORS:
            more = bad.num_rows - _LOGGED_ERRORS
            logger.warning("run %s: shard %r: %d more error rows", self._run, shard.uri, more)

    def _failed(self, shard: Shard, error: str, failed_version: str | None) -> ManifestRow:
        return ManifestRow(
            shard.uri,
            format=shard.format,
            size=shard.size,
            error=error,
            failed_version=failed_version,
            run=self._run,
            committed_at=datetime.now(UTC),
        )

    def _write(self, shard: Shard, output: str, content: bytes, footer: Footer) -> tuple[Footer, str] | None:
        """Writes a prediction file; returns what lies there then, and its version; None if nothing does.

        Where there is another file than the plan has seen, another run is at work, or was until it
        died: a file of the same version of the shard stays; of two versions, the input's own wins.
        """
        uri = f"{self._target.partition}/{output}"
        expected = self._expected.get(shard.uri, ABSENT)
        while True:
            try:
                return footer, self._storage.write(uri, content, expected).version
            except ObjectChanged:
                found = self._found(uri)
            if found is None:
                # Removed: by hand, or since its images are in other groups now.
                if not self._is_current(shard):
                    return None
                expected = ABSENT
                continue
            theirs, expected = found
            same = (theirs.version, theirs.fingerprint) == (footer.version, footer.fingerprint)
            if same or not self._is_current(shard):
                return theirs, expected

    def _found(self, uri: str) -> tuple[Footer, str] | None:
        """The footer and the version of a prediction file; None if there is none."""
        while True:
            try:
                version = self._storage.stat(uri).version
                with self._storage.open(uri, version) as file:
                    return read_footer(uri, file), version
            except ObjectNotFound:
                return None
            except ObjectChanged:
                continue

    def _assemble(self, shard: Shard, arrived: OpenShard) -> pa.Table:
        """The shard's prediction rows, in its order."""
        chunks = [arrived.chunks[start] for start in sorted(arrived.chunks)]
        ends = np.cumsum([chunk.samples.num_rows for chunk in chunks])
        if [chunk.start for chunk in chunks] != [0, *ends[:-1].tolist()]:
            raise IncompleteShardError(f"{shard.uri}: its chunks leave gaps or overlap")
        samples = pa.concat_tables([chunk.samples for chunk in chunks])
        samples = samples.rename_columns(
            ["target_id" if name == "target" else name for name in samples.column_names]
        )
        count = samples.num_rows
        samples = samples.append_column("shard", pa.repeat(shard.uri, count))
        samples = samples.append_column("index", pa.array(np.arange(count), pa.int64()))
        return samples.select(self._schema.names).cast(self._schema).combine_chunks()
