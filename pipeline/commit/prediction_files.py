"""From the chunks of a shard to its prediction file, which is written in one conditional write.

A file replaces the version that the plan has seen. Where another version is found, another run is active,
or was until it died: a file of the same version of the shard stays; of two versions, the input's own wins.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit.manifest import ManifestRow
from pipeline.commit.partition import Partition
from pipeline.predictions import (
    Footer,
    PredictionOptions,
    encode_predictions,
    prediction_path,
    prediction_schema,
    read_footer,
    serialize_statistics,
)
from pipeline.read import Chunk, Shard
from pipeline.statistics import ClassStatistics, ErrorCauses, StageMetrics, StageTimer
from pipeline.storage import ABSENT, Versioned

logger = logging.getLogger("cvt_label")

# Of a shard; its prediction file has all of them.
_LOGGED_ERRORS = 3


class IncompleteShardError(RuntimeError):
    """The stream of results ended, or went wrong, before a shard was covered."""


@dataclass
class OpenShard:
    """The chunks of a shard that have arrived.

    Attributes:
        chunks: by the index of their first sample.
        total: the shard's number of samples, once its last chunk has arrived.
        transient: whether the cause of the error is the storage, not the shard.
    """

    chunks: dict[int, Chunk] = field(default_factory=dict)
    total: int | None = None
    error: str | None = None
    transient: bool = False
    samples: int = 0
    encoded_bytes: int = 0

    def add(self, chunk: Chunk) -> bool:
        """Keeps a chunk; False where a second attempt brought a chunk that is there already.

        A second attempt may fail earlier than the first, and reports this in place of a chunk that is there.
        """
        if chunk.start in self.chunks and chunk.error is None:
            return False
        self.chunks[chunk.start] = chunk
        self.samples += chunk.samples.num_rows
        self.encoded_bytes += chunk.encoded_bytes
        if chunk.total is not None:
            self.total, self.error, self.transient = chunk.total, chunk.error, chunk.transient
        return True

    @property
    def complete(self) -> bool:
        """Whether nothing more is to be waited for."""
        return self.error is not None or self.samples == self.total

    @property
    def errors(self) -> int:
        """Number of samples that are error rows."""
        return sum(map(count_errors, self.chunks.values()))

    def rows(self, shard: Shard, options: PredictionOptions) -> pa.Table:
        """The prediction rows of the complete shard; raises `IncompleteShardError`."""
        chunks = [self.chunks[start] for start in sorted(self.chunks)]
        ends = np.cumsum([chunk.samples.num_rows for chunk in chunks])
        if [chunk.start for chunk in chunks] != [0, *ends[:-1].tolist()]:
            raise IncompleteShardError(f"{shard.uri}: its chunks leave gaps or overlap")
        samples = pa.concat_tables([chunk.samples for chunk in chunks])
        samples = samples.rename_columns({"target": "target_id"})
        samples = samples.append_column("shard", pa.repeat(shard.uri, samples.num_rows))
        samples = samples.append_column("index", pa.array(np.arange(samples.num_rows), pa.int64()))
        schema = prediction_schema(options.embedding, options.embedding_width)
        return samples.select(schema.names).cast(schema).combine_chunks()


def count_errors(chunk: Chunk) -> int:
    """Number of a chunk's samples that are error rows."""
    count: int = chunk.samples.num_rows - chunk.samples["error"].null_count
    return count


class CommittedShard(NamedTuple):
    """A shard that is done: its manifest row, the metrics of the commit, and the causes of its error rows."""

    row: ManifestRow
    metrics: StageMetrics
    causes: ErrorCauses


@dataclass(frozen=True)
class PredictionWriter:
    """Writes the prediction files of a run; thread-safe.

    Attributes:
        expected: by URI of a shard, the version of the prediction file that it has already.
        is_current: returns whether the input still has this version of a shard.
        before_group: called before the labels of a group of image files are written; raises if they must
            not be written. Another run may have grouped the images differently, so that an overtaken run's
            labels would be there twice; tars and Parquet files don't share samples.
    """

    partition: Partition
    fingerprint: str
    options: PredictionOptions
    run: str
    expected: Mapping[str, str]
    is_current: Callable[[Shard], bool]
    before_group: Callable[[], None] = lambda: None

    def commit(self, shard: Shard, arrived: OpenShard) -> CommittedShard:
        """Writes the file of a complete shard, or none if it can't be read; raises `StorageError`."""
        meter, causes = StageTimer(), ErrorCauses()
        row, size = ManifestRow(shard.uri, format=shard.format, size=shard.size), 0
        with meter:
            if arrived.error is not None:
                failed_version = None if arrived.transient else shard.version
                row = replace(row, error=arrived.error, failed_version=failed_version)
            elif written := self._write(shard, predictions := arrived.rows(shard, self.options)):
                row, size = written
                causes.add(shard.uri, predictions)
            else:
                error = f"{shard.uri}: has changed since it was listed"
                row = replace(row, error=error, failed_version=shard.version)
        row = replace(row, run=self.run, committed_at=datetime.now(UTC))
        return CommittedShard(row, meter.collect(row.rows or 0, size), causes)

    def _write(self, shard: Shard, predictions: pa.Table) -> tuple[ManifestRow, int] | None:
        """Writes the rows of a shard; returns its manifest row, and the bytes written.

        None where no file is there: it was removed, and the input no longer has this version of the shard.
        """
        footer = Footer(
            shard=shard.uri,
            version=shard.version,
            format=shard.format,
            size=shard.size,
            fingerprint=self.fingerprint,
            rows=predictions.num_rows,
            errors=predictions.num_rows - predictions["error"].null_count,
            duplicate_keys=predictions.num_rows - pc.count_distinct(predictions["key"]).as_py(),
            statistics=serialize_statistics(
                ClassStatistics.from_predictions(predictions, len(self.options.labels)).to_partial()
            ),
        )
        self._log_errors(shard, predictions)
        output = f"predictions/{prediction_path(shard.uri)}"
        content, uri = encode_predictions(predictions, footer), f"{self.partition.uri}/{output}"
        if shard.members:
            self.before_group()
        storage, expected = self.partition.storage, self.expected.get(shard.uri, ABSENT)
        theirs: Versioned[Footer] | None = None

        def change(version: str) -> bytes | None:
            nonlocal theirs
            theirs = None
            if version == expected:
                return content
            if version != ABSENT:  # else removed by hand, or because its images are in other groups now
                with storage.open(uri, version) as file:
                    found = read_footer(uri, file)
                theirs = Versioned(found, version)
                if (found.version, found.fingerprint) == (footer.version, footer.fingerprint):
                    return None
            return content if self.is_current(shard) else None

        written = storage.update(uri, change, expected)
        if written is not None:
            theirs = Versioned(footer, written.version)
        if theirs is None:
            return None
        return ManifestRow.of_file(theirs.content, output, theirs.version), len(content)

    def _log_errors(self, shard: Shard, predictions: pa.Table) -> None:
        """Logs a shard's first error rows; names come from data, so they are quoted."""
        bad = predictions.filter(pc.is_valid(predictions["error"]))
        for row in bad.slice(0, _LOGGED_ERRORS).select(["index", "key", "error"]).to_pylist():
            where = self.run, shard.uri, row["index"], row["key"]
            logger.warning("run %s: shard %r, sample %d, key %r: %s", *where, row["error"])
        if bad.num_rows > _LOGGED_ERRORS:
            more = bad.num_rows - _LOGGED_ERRORS
            logger.warning("run %s: shard %r: %d more error rows", self.run, shard.uri, more)
