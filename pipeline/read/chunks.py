"""Chunks: some hundred samples of one shard, and their conversion to Arrow blocks for Ray Data.

A chunk is one row of a block, so that Ray can neither split nor merge chunks.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.read.samples import Sample, ShardError, scalar_array
from pipeline.statistics import StageMetrics

if TYPE_CHECKING:
    from torch import Tensor


_SAMPLE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("target", pa.int32()),
        ("unmatched", pa.string()),
        ("error", pa.string()),
        ("uri", pa.string()),
        ("version", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("image", pa.large_binary()),
    ]
)
#: The samples of a chunk without samples.
NO_SAMPLES = pa.Table.from_batches([], _SAMPLE_SCHEMA)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive samples of one shard.

    Attributes:
        shard: Index of the shard in the plan.
        start: Index of the first sample in the shard.
        samples: One row per sample; the columns depend on the stage.
        total: Number of samples of the shard; only in the last chunk of the shard.
        error: Cause of a shard that cannot be read further; only in the last chunk of the shard.
        pixels: uint8 (images, height, width, 3) of the samples without an error, as an array, or a tensor on
            the classifier's device.
        transient: Whether a later attempt may succeed.
        readable: Number of samples before the error that `input.on_damaged_shard: keep` labels.
        damage: Why a shard is labeled only up to here; only in the last chunk of the shard.
        merged: Number of further images of the samples, which are not labeled.
        retries: Number of retried storage failures while the chunk was read, by kind.
        runtime: Runtime that classified the images; empty before.
        metrics: By stage.
    """

    shard: int
    start: int
    samples: pa.Table
    total: int | None = None
    error: str | None = None
    pixels: np.ndarray | Tensor | None = None
    transient: bool = False
    readable: int = 0
    damage: str | None = None
    merged: int = 0
    encoded_bytes: int = 0
    retries: Mapping[str, int] = field(default_factory=dict)
    runtime: str = ""
    metrics: Mapping[str, StageMetrics] = field(default_factory=dict)

    def to_block(self) -> pa.Table:
        """Returns the chunk as a table with one row; pixels must be an array and are not copied."""
        rows = self.samples.to_struct_array().combine_chunks()
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "samples"}
        buffers = list[pickle.PickleBuffer]()
        columns = {
            "samples": pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows),
            "others": pa.array([pickle.dumps(others, 5, buffer_callback=buffers.append)], pa.binary()),
        }
        for pixels in buffers:  # one value that shares the array's memory
            data = pa.py_buffer(pixels.raw())
            ends = pa.py_buffer(np.array([0, data.size], np.int64))
            columns["pixels"] = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, data])
        return pa.table(columns)

    @staticmethod
    def from_block(block: pa.Table) -> Iterator[Chunk]:
        """Yields the chunk of each row of a block; a block may have no rows and no columns."""
        for row in range(block.num_rows):
            record = block.slice(row, 1)
            samples = record["samples"].combine_chunks().flatten()
            pixels = [record["pixels"][0].as_buffer()] if "pixels" in record.column_names else []
            others = pickle.loads(record["others"][0].as_py(), buffers=pixels)
            yield Chunk(samples=pa.Table.from_struct_array(samples), **others)


def failed_chunk(chunk: Chunk, error: str) -> Chunk:
    """Returns a chunk without samples that makes its shard an error; a later run tries the shard again."""
    samples, pixels = chunk.samples.slice(0, 0), None if chunk.pixels is None else chunk.pixels[:0]
    return replace(chunk, samples=samples, pixels=pixels, total=chunk.start, error=error, transient=True)


def split_into_chunks(
    samples: Iterable[Sample], shard: int, max_images: int, max_bytes: int, uri: str = ""
) -> Iterator[Chunk]:
    """Splits the samples of a shard into one or more chunks. Every attempt yields the same chunks.

    The samples may raise `ShardError`. The last chunk of a shard that cannot be read to its end has the error
    and no samples, because an exception would end the job. `max_bytes` limits the images, keys, messages and
    carried values of a chunk; a single sample may be larger. `uri` is the shard's URI, for errors.
    """
    start, size = 0, 0
    pending: list[Sample] = []
    error, transient, readable, damage = None, False, 0, None
    try:
        try:
            for sample in samples:
                texts = (sample.key, sample.error, sample.unmatched)
                more = len(sample.image or b"") + sum(len(text.encode()) for text in texts if text)
                more += sum(scalar_array([value]).nbytes for value in sample.carried)
                if pending and (len(pending) == max_images or size + more > max_bytes):
                    yield _chunk(shard, start, pending)
                    start, pending, size = start + len(pending), [], 0
                pending.append(sample)
                size += more
        except ShardError as failure:
            if not failure.keep:
                raise
            damage = str(failure)
        last = _chunk(shard, start, pending)
    except Exception as failure:  # Arrow raises other errors, for example for too many bytes
        if not isinstance(failure, ShardError):
            failure = ShardError(uri, f"cannot store samples: {failure!r}", isinstance(failure, MemoryError))
        error, transient, readable = str(failure), failure.transient, failure.readable
        last = _chunk(shard, start, [])
    total = start + last.samples.num_rows
    yield replace(last, total=total, error=error, transient=transient, readable=readable, damage=damage)


def sample_table(samples: Sequence[Sample]) -> pa.Table:
    """Returns samples as the table of a chunk; the columns `carried.0`, `carried.1`... follow."""
    columns = {name: [getattr(sample, name) for sample in samples] for name in _SAMPLE_SCHEMA.names}
    table = pa.table(columns, schema=_SAMPLE_SCHEMA)
    for number, values in enumerate(zip(*(sample.carried for sample in samples), strict=True)):
        table = table.append_column(f"carried.{number}", scalar_array(values))
    return table


def _chunk(shard: int, start: int, samples: list[Sample]) -> Chunk:
    size = sum(len(sample.image or b"") for sample in samples)
    table, merged = sample_table(samples), sum(sample.merged for sample in samples)
    return Chunk(shard, start, table, merged=merged, encoded_bytes=size)
