"""Assembles the chunks of a shard and writes the prediction file, in one conditional write."""

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
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
    carried_column,
    encode_predictions,
    prediction_path,
    prediction_schema,
    read_footer,
    serialize_table,
)
from pipeline.read import Chunk, Shard
from pipeline.statistics import ClassStatistics, ErrorCauses, StageMetrics, StageTimer
from pipeline.storage import ABSENT, Versioned
from pipeline.text import arrow_type, remove_secrets

logger = logging.getLogger("cvt_label")

#: Error rows of a shard that are logged; the prediction file has all of them.
_MAX_LOGGED_ERRORS = 3


class IncompleteShardError(RuntimeError):
    """Results of a shard are missing or overlap."""


@dataclass
class OpenShard:
    """The chunks of a shard that have arrived.

    Attributes:
        chunks: by the index of their first sample.
        last: the last chunk of the shard; None until it has arrived.
        samples, errors, encoded_bytes: sums over the chunks.
    """

    chunks: dict[int, Chunk] = field(default_factory=dict)
    last: Chunk | None = None
    samples: int = 0
    errors: int = 0
    encoded_bytes: int = 0

    def add(self, chunk: Chunk) -> bool:
        """Adds a chunk; returns False if a retry delivers a chunk again.

        A retry may fail earlier than the first attempt. Its error then replaces a chunk that has arrived.
        """
        if chunk.start in self.chunks and chunk.error is None:
            return False
        self.chunks[chunk.start] = chunk
        self.samples += chunk.samples.num_rows
        self.errors += chunk.samples.num_rows - chunk.samples["error"].null_count
        self.encoded_bytes += chunk.encoded_bytes
        if chunk.total is not None:
            self.last = chunk
        return True

    @property
    def complete(self) -> bool:
        """Whether all samples have arrived, or the shard can't be read."""
        return self.last is not None and (self.last.error is not None or self.samples == self.last.total)

    def take_samples(self, uri: str) -> pa.Table:
        """Returns the samples of all chunks, and drops the chunks; raises `IncompleteShardError`."""
        chunks = [self.chunks[start] for start in sorted(self.chunks)]
        ends = np.cumsum([chunk.samples.num_rows for chunk in chunks])
        if [chunk.start for chunk in chunks] != [0, *ends[:-1].tolist()]:
            raise IncompleteShardError(f"{uri}: the chunks have gaps or overlap")
        # A chunk without samples has no carried columns.
        samples = pa.concat_tables([chunk.samples for chunk in chunks], promote_options="permissive")
        self.chunks = {}
        return samples


def prediction_rows(samples: pa.Table, shard: Shard, options: PredictionOptions) -> pa.Table:
    """Returns the rows of a prediction file for the samples of a shard."""
    samples = samples.rename_columns({"target": "target_id"}).combine_chunks()
    count, columns = samples.num_rows, {name: samples[name] for name in samples.column_names}
    # Constant columns come last: they are as large as the keys, and are not copied again.
    columns |= {"shard": pa.repeat(shard.uri, count), "index": pa.array(np.arange(count), pa.int64())}
    if shard.format in ("webdataset", "parquet"):
        file = shard.object
        uris = columns["shard"] if file.uri == shard.uri else pa.repeat(file.uri, count)
        columns |= {"uri": uris, "version": pa.repeat(file.version, count)}
    if options.label_names:
        names = pa.array(options.labels, pa.string())
        columns["target"] = names.take(samples["target_id"].combine_chunks())
        topk = samples["topk_label_ids"].combine_chunks()
        values = names.take(pc.list_flatten(topk))
        columns["topk_labels"] = pa.ListArray.from_arrays(topk.offsets, values, mask=topk.is_null())
    schema = prediction_schema(options.embedding, options.embedding_width, options.label_names)
    rows = pa.table({name: columns[name] for name in schema.names}).cast(schema)
    for number, (name, kind) in enumerate(options.carry.items()):
        values = pa.nulls(len(rows), arrow_type(kind or "string"))
        if f"carried.{number}" in samples.column_names:
            values = samples[f"carried.{number}"]
            if shard.format == "webdataset" and kind is None:
                values = _parse_json(values.to_pylist())
        rows = rows.append_column(carried_column(name), values)
    return rows


def _parse_json(texts: list[str | None]) -> pa.Array:
    """Returns JSON values as bool, int64 or double if all of them fit, else as text; nested ones as JSON."""
    values = [None if text is None else json.loads(text) for text in texts]
    kinds = {type(value) for value in values if value is not None}
    if kinds and kinds <= {bool, int, float}:
        with suppress(OverflowError, pa.ArrowInvalid):  # integers of more bits, or both kinds
            return pa.array(values)
    shown = (v if isinstance(v, str) else text for text, v in zip(texts, values, strict=True))
    # JSON may have halves of surrogate pairs, which are no text in Arrow.
    return pa.array([x and x.encode(errors="backslashreplace").decode() for x in shown], pa.string())


class CommittedShard(NamedTuple):
    """The outcome of a shard: manifest row, metrics of the commit, error rows and unmatched targets."""

    row: ManifestRow
    metrics: StageMetrics
    causes: ErrorCauses
    unmatched: ErrorCauses


@dataclass(frozen=True)
class PredictionWriter:
    """Writes the prediction files of a run; thread-safe.

    Attributes:
        expected: version of the current prediction file, by URI of the shard; None or no entry: no file.
        is_current: returns whether the input still has this version of a shard.
        filled: `target_id` and columns of `input.carry`, of which a committed row has a value; grows.
        add_copied: returns all samples of a shard, given those that were labeled.
        before_write: called before the labels of a shard are written; raises to prevent the write.
    """

    partition: Partition
    fingerprint: str
    options: PredictionOptions
    run: str
    expected: Mapping[str, str | None]
    is_current: Callable[[Shard], bool]
    add_copied: Callable[[Shard, pa.Table], pa.Table] = lambda shard, samples: samples
    before_write: Callable[[Shard], None] = lambda shard: None
    filled: set[str] = field(default_factory=set)

    def commit(self, shard: Shard, arrived: OpenShard) -> CommittedShard:
        """Writes the file of a complete shard, unless the shard can't be read; raises `StorageError`."""
        timer, causes, unmatched = StageTimer(), ErrorCauses(), ErrorCauses()
        row, size = ManifestRow(shard.uri, format=shard.format, size=shard.size), 0
        last = arrived.last
        assert last is not None
        with timer:
            if last.error is not None:
                failed_version, readable = None if last.transient else shard.version, last.readable or None
                error = remove_secrets(last.error)
                row = replace(row, error=error, failed_version=failed_version, readable_rows=readable)
            else:
                samples = self.add_copied(shard, arrived.take_samples(shard.uri))
                predictions = prediction_rows(samples, shard, self.options)
                unmatched.add_unmatched(shard.uri, samples)
                for column in ("target_id", *map(carried_column, self.options.carry)):
                    if predictions[column].null_count < len(predictions):
                        self.filled.add(column)
                if written := self._write(shard, predictions, unmatched.count, last):
                    row, size = written
                    causes.add(shard.uri, predictions)
                else:
                    unmatched = ErrorCauses()
                    error = f"{shard.uri}: changed after it was listed"
                    row = replace(row, error=error, failed_version=shard.version)
        row = replace(row, run=self.run, committed_at=datetime.now(UTC))
        return CommittedShard(row, timer.collect(row.rows or 0, size), causes, unmatched)

    def _write(
        self, shard: Shard, predictions: pa.Table, unmatched: int, last: Chunk
    ) -> tuple[ManifestRow, int] | None:
        """Writes the rows of a shard; returns the manifest row of the file, and the size in bytes.

        The file replaces the expected version. Any other version was written by an overlapping run: it stays
        if it has the same version of the shard. Otherwise the version that the input has now wins. Returns
        None if no file exists: it was removed, and the input no longer has this version of the shard.
        """
        # A table of hashes, as of `count_distinct`, would need up to 370 bytes per key.
        distinct_keys = pc.run_end_encode(predictions["key"].combine_chunks().sort()).values
        footer = Footer(
            shard=shard.uri,
            version=shard.version,
            format=shard.format,
            size=shard.size,
            fingerprint=self.fingerprint,
            rows=predictions.num_rows,
            errors=predictions.num_rows - predictions["error"].null_count,
            duplicate_keys=predictions.num_rows - len(distinct_keys),
            unmatched_targets=unmatched,
            statistics=serialize_table(
                ClassStatistics.from_predictions(predictions, len(self.options.labels)).to_partial()
            ),
            damage=remove_secrets(last.damage or ""),
            runtime=last.runtime,
        )
        self._log_errors(shard, predictions)
        output = f"predictions/{prediction_path(shard.uri)}"
        content, uri = encode_predictions(predictions, footer), f"{self.partition.uri}/{output}"
        storage, expected = self.partition.storage, self.expected.get(shard.uri) or ABSENT
        self.before_write(shard)
        current: Versioned[Footer] | None = None

        def change(version: str) -> bytes | None:
            nonlocal current
            current = None
            if version == expected:
                return content
            if version != ABSENT:  # if absent, a user removed the file, or its images were regrouped
                with storage.open(uri, version) as file:
                    found = read_footer(uri, file)
                current = Versioned(found, version)
                if (found.version, found.fingerprint) == (footer.version, footer.fingerprint):
                    return None
            return content if self.is_current(shard) else None

        written = storage.update(uri, change, expected)
        if written is not None:
            current = Versioned(footer, written.version)
        if current is None:
            return None
        return ManifestRow.of_file(current.content, output, current.version), len(content)

    def _log_errors(self, shard: Shard, predictions: pa.Table) -> None:
        """Logs the first error rows of a shard; names come from data, so they are quoted."""
        bad = predictions.select(["index", "key", "error"]).filter(pc.is_valid(predictions["error"]))
        for row in bad.slice(0, _MAX_LOGGED_ERRORS).to_pylist():
            where = self.run, shard.uri, row["index"], row["key"]
            logger.warning("run %s: shard %r, sample %d, key %r: %s", *where, row["error"])
        if bad.num_rows > _MAX_LOGGED_ERRORS:
            more = bad.num_rows - _MAX_LOGGED_ERRORS
            logger.warning("run %s: shard %r: %d more error rows", self.run, shard.uri, more)
