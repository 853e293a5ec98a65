"""Writing prediction files: one file per shard, in one conditional write.

A file replaces the version that the plan has seen. Where another version is found, another run is active,
or was until it died: a file of the same version of the shard stays; of two versions, the input's own wins.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit.assembly import OpenShard
from pipeline.commit.manifest import ManifestRow
from pipeline.commit.partition import Partition
from pipeline.predictions import Footer, PredictionOptions, encode, prediction_path, read_footer
from pipeline.read import Shard
from pipeline.statistics import Causes, ClassStatistics, Meter, StageMetrics
from pipeline.storage import ABSENT, Versioned

logger = logging.getLogger("cvt_label")

# Of a shard; its prediction file has all of them.
_LOGGED_ERRORS = 3


@dataclass(frozen=True, slots=True)
class CommittedShard:
    """A shard that is done: its manifest row, the metrics of the commit, and the causes of its error rows."""

    row: ManifestRow
    metrics: StageMetrics
    causes: Causes


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
        """Writes the prediction file of a complete shard; a shard that can't be read gets none.

        Raises:
            StorageError: the file can't be written.
        """
        meter, causes = Meter(), Causes()
        with meter:
            if arrived.error is not None:
                failed_version = None if arrived.transient else shard.version
                row, size = self._failed(shard, arrived.error, failed_version), 0
            else:
                predictions = arrived.rows(shard, self.options)
                row, size = self._commit(shard, predictions)
                if row.output is not None:
                    causes.add(shard.uri, predictions)
        return CommittedShard(row, meter.take(row.rows or 0, size), causes)

    def _commit(self, shard: Shard, predictions: pa.Table) -> tuple[ManifestRow, int]:
        """Writes the rows of a shard; returns its manifest row, and the bytes written."""
        footer = Footer(
            shard=shard.uri,
            version=shard.version,
            format=shard.format,
            size=shard.size,
            fingerprint=self.fingerprint,
            rows=predictions.num_rows,
            errors=predictions.num_rows - predictions["error"].null_count,
            duplicate_keys=predictions.num_rows - pc.count_distinct(predictions["key"]).as_py(),
            partial=ClassStatistics.of(predictions, len(self.options.labels)).to_partial(),
        )
        self._log_errors(shard, predictions)
        output = f"predictions/{prediction_path(shard.uri)}"
        content = encode(predictions, footer)
        if shard.members:
            self.before_group()
        written = self._write(shard, f"{self.partition.uri}/{output}", content, footer)
        if written is None:
            return self._failed(shard, f"{shard.uri}: has changed since it was listed", shard.version), 0
        row = ManifestRow.of_file(written.content, output, written.version)
        return replace(row, run=self.run, committed_at=datetime.now(UTC)), len(content)

    def _log_errors(self, shard: Shard, predictions: pa.Table) -> None:
        """Logs a shard's first error rows; names come from data, so they are quoted."""
        bad = predictions.filter(pc.is_valid(predictions["error"]))
        for row in bad.slice(0, _LOGGED_ERRORS).select(["index", "key", "error"]).to_pylist():
            where = self.run, shard.uri, row["index"], row["key"]
            logger.warning("run %s: shard %r, sample %d, key %r: %s", *where, row["error"])
        if bad.num_rows > _LOGGED_ERRORS:
            more = bad.num_rows - _LOGGED_ERRORS
            logger.warning("run %s: shard %r: %d more error rows", self.run, shard.uri, more)

    def _failed(self, shard: Shard, error: str, failed_version: str | None) -> ManifestRow:
        return ManifestRow(
            shard.uri,
            format=shard.format,
            size=shard.size,
            error=error,
            failed_version=failed_version,
            run=self.run,
            committed_at=datetime.now(UTC),
        )

    def _write(self, shard: Shard, uri: str, content: bytes, footer: Footer) -> Versioned[Footer] | None:
        """Writes a prediction file; returns the footer and version of the file that is there afterwards.

        None where there is none: it was removed, and the input no longer has this version of the shard.
        """
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
        return theirs if written is None else Versioned(footer, written.version)
