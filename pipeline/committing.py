"""The committer: results of chunks in, one prediction file a shard out, in one atomic write.

What it holds is the open shards' result rows, never pixels. It runs in the driver and knows nothing of Ray.

The order of a commit:
 1. chunks of a shard are kept, by their first index, until they cover the shard, however they arrive;
 2. the file is assembled, in the shard's order, and encoded in memory;
 3. one atomic write makes it visible: before it there is no trace of the shard, after it the whole of it;
 4. only then does the shard get a manifest row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.chunks import Chunk
from pipeline.classifying import PredictionOptions
from pipeline.manifest import ManifestRow
from pipeline.predictions import Footer, encode, pack_partial, prediction_schema
from pipeline.shards import Shard, prediction_path
from pipeline.statistics import ClassStatistics
from pipeline.storage import Storage

#: Files in the making: each is one shard's result rows, so few are enough to hide a PUT's latency.
WRITERS = 4


class IncompleteShardError(RuntimeError):
    """The stream of results ended, or went wrong, before a shard was covered."""


@dataclass
class _OpenShard:
    """The chunks of a shard that have arrived."""

    chunks: dict[int, Chunk] = field(default_factory=dict)
    total: int | None = None
    error: str | None = None
    samples: int = 0

    def add(self, chunk: Chunk) -> bool:
        """Keeps a chunk; False where a second attempt brought one that is there already."""
        if chunk.start in self.chunks:
            return False
        self.chunks[chunk.start] = chunk
        self.samples += chunk.samples.num_rows
        if chunk.total is not None:
            self.total, self.error = chunk.total, chunk.error
        return True

    @property
    def complete(self) -> bool:
        return self.samples == self.total


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the committer is: what has arrived, and what is committed."""

    images: int
    errors: int
    shards: int


class Committer:
    """Assembles shards and writes their prediction files; use it as a context manager.

    Attributes:
        rows: the manifest rows of the shards that are done, by URI, those that couldn't be read too.
    """

    def __init__(
        self,
        storage: Storage,
        partition: str,
        plan: Sequence[Shard],
        fingerprint: str,
        options: PredictionOptions,
        run: str,
    ) -> None:
        """Args:
        storage: where the files go.
        partition: URI of the model's partition.
        plan: the shards, by the number that their chunks carry.
        fingerprint: hash over everything that decides a label.
        options: what the prediction columns are.
        run: id of the run.
        """
        self.rows: dict[str, ManifestRow] = {}
        self._storage = storage
        self._partition = partition
        self._plan = plan
        self._fingerprint = fingerprint
        self._options = options
        self._run = run
        self._schema = prediction_schema(options.embedding, options.embedding_width)
        self._open: dict[int, _OpenShard] = {}
        self._closed: set[int] = set()
        self._images = self._errors = 0
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="commit")
        self._writes: deque[Future[ManifestRow]] = deque()

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
        if chunk.shard in self._closed:
            return
        shard = self._open.setdefault(chunk.shard, _OpenShard())
        if not shard.add(chunk):
            return
        self._images += chunk.samples.num_rows
        self._errors += _errors(chunk)
        if shard.complete:
            if shard.error is not None:  # then its samples don't come out after all
                self._images -= shard.samples
                self._errors -= sum(map(_errors, shard.chunks.values()))
            del self._open[chunk.shard]
            self._closed.add(chunk.shard)
            self._writes.append(self._writers.submit(self._commit, self._plan[chunk.shard], shard))
        while self._writes and (len(self._writes) > 2 * WRITERS or self._writes[0].done()):
            self._settle(self._writes.popleft())

    def finish(self) -> None:
        """Waits for the last files, when the stream of results has ended.

        Raises:
            StorageError: a file couldn't be written.
            IncompleteShardError: results are missing, so that a shard of the plan isn't covered.
        """
        while self._writes:
            self._settle(self._writes.popleft())
        for number, shard in enumerate(self._plan):
            if number not in self._closed:
                arrived = self._open.get(number, _OpenShard())
                raise IncompleteShardError(
                    f"{shard.uri}: {arrived.samples} of {arrived.total or 'unknown'} samples came out"
                )

    def progress(self) -> Progress:
        """How far it is."""
        return Progress(self._images, self._errors, len(self.rows))

    def _settle(self, write: Future[ManifestRow]) -> None:
        row = write.result()
        self.rows[row.uri] = row

    def _commit(self, shard: Shard, arrived: _OpenShard) -> ManifestRow:
        if arrived.error is not None:
            return self._row(shard, error=arrived.error)
        predictions = self._assemble(shard, arrived)
        stats = ClassStatistics.of(predictions, len(self._options.labels)).to_partial()
        errors = predictions.num_rows - predictions["error"].null_count
        footer = Footer(
            shard=shard.uri,
            version=shard.version,
            fingerprint=self._fingerprint,
            rows=predictions.num_rows,
            errors=errors,
            partial=stats,
        )
        output = f"predictions/{prediction_path(shard.uri)}"
        self._storage.write(f"{self._partition}/{output}", encode(predictions, footer))
        return self._row(
            shard,
            rows=predictions.num_rows,
            errors=errors,
            duplicate_keys=predictions.num_rows - pc.count_distinct(predictions["key"]).as_py(),
            output=output,
            statistics=pack_partial(stats),
        )

    def _assemble(self, shard: Shard, arrived: _OpenShard) -> pa.Table:
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

    def _row(
        self,
        shard: Shard,
        *,
        rows: int | None = None,
        errors: int | None = None,
        duplicate_keys: int | None = None,
        error: str | None = None,
        output: str | None = None,
        statistics: bytes | None = None,
    ) -> ManifestRow:
        return ManifestRow(
            uri=shard.uri,
            version=shard.version,
            format=shard.format,
            size=shard.size,
            rows=rows,
            errors=errors,
            duplicate_keys=duplicate_keys,
            error=error,
            output=output,
            run=self._run,
            committed_at=datetime.now(UTC),
            statistics=statistics,
        )


def _errors(chunk: Chunk) -> int:
    return chunk.samples.num_rows - chunk.samples["error"].null_count
